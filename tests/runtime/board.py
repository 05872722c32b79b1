"""What the public boards of vLLM select, by name."""

from __future__ import annotations

HISTOGRAM = ("_bucket", "_sum", "_count")
# Series and labels that the expressions of vLLM's boards (prometheus_grafana/grafana.json, now and as of 2024) select.
BOARD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm:e2e_request_latency_seconds": (HISTOGRAM, ()),
    "vllm:prompt_tokens": (("_total",), ()),
    "vllm:generation_tokens": (("_total",), ()),
    "vllm:time_per_output_token_seconds": (HISTOGRAM, ()),
    "vllm:inter_token_latency_seconds": (HISTOGRAM, ()),
    "vllm:num_requests_running": (("",), ()),
    "vllm:num_requests_swapped": (("",), ()),
    "vllm:num_requests_waiting": (("",), ()),
    "vllm:time_to_first_token_seconds": (HISTOGRAM, ()),
    "vllm:gpu_cache_usage_perc": (("",), ()),
    "vllm:kv_cache_usage_perc": (("",), ()),
    "vllm:request_prompt_tokens": (("_bucket",), ()),
    "vllm:request_generation_tokens": (("_bucket",), ()),
    "vllm:request_success": (("_total",), ("finished_reason",)),
    "vllm:request_queue_time_seconds": (("_sum",), ()),
    "vllm:request_prefill_time_seconds": (("_sum",), ()),
    "vllm:request_decode_time_seconds": (("_sum",), ()),
    "vllm:request_max_num_generation_tokens": (("_sum",), ()),
}
