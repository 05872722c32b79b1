"""vLLM's metric about adapters: which run and which wait, in labels, at the time that is its value."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from skerry.runtime.adapters import Adapters


class AdapterInfo(Collector):
    """`in_use` has the slots of the sequences that run and of those that wait. Nothing on an engine without slots."""

    def __init__(self, adapters: Adapters, in_use: Callable[[], tuple[set[int], set[int]]]) -> None:
        self._adapters, self._in_use = adapters, in_use

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if not self._adapters.slots:
            return
        names = self._adapters.by_slot()
        running, waiting = (
            ",".join(sorted({names[slot] for slot in slots if slot in names})) for slots in self._in_use()
        )
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that are in use", labels=labels)
        family.add_metric([str(self._adapters.slots), running, waiting], time.time())
        yield family
