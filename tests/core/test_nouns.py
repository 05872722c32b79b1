"""Model, target, release, config, chat and the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from skerry.core import cli, config
from skerry.core.bundle import open_bundle
from skerry.core.chat import ChatTemplate
from skerry.core.errors import ConfigError, GateFailed, InputError, NotFound, UsageError
from skerry.core.model import Checkpoint, ModelSpec, write_lineage
from skerry.core.release import Release, manifest_path
from skerry.core.target import Device, Target, incompatibility, local_device

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_model_spec_from_config() -> None:
    spec = ModelSpec.from_hf_config(LLAMA)
    assert (spec.head_size, spec.rope_theta, spec.eos_token_ids, spec.window) == (64, 100000.0, (2,), 0)
    assert 130e6 < spec.parameters < 140e6
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_config_of_text_and_images_gives_its_text() -> None:
    """As Gemma 3 4B was released: what equals the defaults of transformers' class is not in the file."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "eos_token_id": [1, 106]}
    spec = ModelSpec.from_hf_config(config)
    assert (spec.family, spec.heads, spec.kv_heads, spec.head_size) == ("gemma3", 8, 4, 256)
    assert (spec.vocab_size, spec.max_context, spec.window, spec.rope_theta) == (262208, 131072, 1024, 1e6)
    assert (spec.tied_embeddings, spec.eos_token_ids, spec.rope_scaling) == (True, (1, 106), text["rope_scaling"])
    assert 3.7e9 < spec.parameters < 4.0e9


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM: unknown architecture"),
        ({"num_key_value_heads": 4}, "9 heads over 4 KV heads"),
        ({"hidden_size": None}, "hidden_size: is missing"),
    ],
)
def test_bad_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelSpec.from_hf_config({**LLAMA, **change})


def test_a_sealed_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config\.json: \[1\] is not an object"):
        write_lineage(tmp_path, {"name": "m", "version": "v1"})


def test_checkpoint_digests_guard_every_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    sealed = write_lineage(tmp_path, {"name": "m", "version": "v1"})
    assert Checkpoint.open(tmp_path).digest == sealed.digest
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(InputError, match=r"model\.safetensors sha256 differs"):
        Checkpoint.open(tmp_path)


def test_targets() -> None:
    assert str(Target.parse("tensorrt-rtx-sm86")) == "tensorrt-rtx-sm86"
    assert Target.parse("ort-cpu") == Target("ort-cpu")
    with pytest.raises(UsageError):
        Target.parse("abacus")


def test_incompatibility_says_why(fixtures: Path) -> None:
    manifest = open_bundle(fixtures / "bundles" / "sound").manifest
    device = local_device()
    assert incompatibility(manifest, device) is None
    assert "backend" in str(incompatibility(manifest, dataclasses.replace(device, backends=())))
    lacking = dataclasses.replace(device, ops=tuple(op for op in device.ops if op != "skerry.Sample:1"))
    assert "lacks: skerry.Sample:1" in str(incompatibility(manifest, lacking))
    assert "MiB of memory" in str(incompatibility(manifest, dataclasses.replace(device, memory_bytes=1 << 20)))
    gpu = dataclasses.replace(manifest, target=Target("ort-cpu", 86))
    assert "compute capability 86" in str(incompatibility(gpu, device))
    assert Device.from_json(device.to_json()) == device


def test_release_picks_by_the_nodes_backends() -> None:
    release = Release("v1", {"ort-cpu": ("m1", "e1"), "tensorrt-sm86": ("m2", "e2")})
    assert Release.from_json(release.to_json()) == release
    assert release.pick(local_device())[0] == "ort-cpu"
    with pytest.raises(NotFound):
        release.pick(dataclasses.replace(local_device(), backends=("ort-cuda",)))
    with pytest.raises(InputError):
        manifest_path("../v1", "ort-cpu")


@dataclass(frozen=True)
class Settings:
    port: int = 8080
    host: str = "127.0.0.1"
    spin: bool = False
    waves: tuple[str, ...] = ("1", "100%")
    limit: float | None = None


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "skerry.toml"
    file.write_text('[node]\nport = 1\nhost = "file"\nlimit = 2\n')
    settings = config.load(Settings, "node", file, {"port": 3}, {"SKERRY_NODE_PORT": "2", "SKERRY_NODE_SPIN": "yes"})
    assert settings == Settings(port=3, host="file", spin=True, limit=2.0)
    assert config.load(Settings, "node", None, {}, {"SKERRY_NODE_WAVES": "1, 50%"}).waves == ("1", "50%")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[node]\nprot = 1\n", r"unknown key node\.prot"),
        ('[node]\nport = "x"\n', "'x' is not an integer"),
        ("[node]\nport = true\n", "True is not an integer"),
        ("node = 1\n", "node is no table"),
        ("[nodes]\nport = 1\n", "unknown section nodes"),
        ("port = 1\n", "unknown section port"),
        ("[node\n", "read config"),
    ],
)
def test_config_errors_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "skerry.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(Settings, "node", file)
    if "prot" in text:
        assert caught.value.hint == "did you mean port?"


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no system role') }}", "{% if %}"],
)
def test_templates_are_sandboxed(source: str) -> None:
    with pytest.raises(InputError):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_template_renders() -> None:
    template = ChatTemplate("{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content }}{% endfor %}", "<s>")
    assert template.render([{"role": "user", "content": "{{ 1 }}"}]) == "<s>user:{{ 1 }}"


def test_exit_codes_and_json_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.run(["bundle", "inspect", "/nowhere", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "bad_bundle"
    assert captured.err.startswith("Error: open bundle /nowhere: no manifest.json")
    assert cli.run(["no-such-command"]) == 2
    assert cli.run(["--version"]) == 0

    def gate(*_: object, **__: object) -> None:
        raise GateFailed("gate", "v3", "perplexity ratio 9 over 1.01")

    monkeypatch.setattr("skerry.core.bundle.find_problems", gate)
    assert cli.run(["bundle", "verify", str(Path(__file__).parent)]) == 3


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, skerry.core.cli as c; c.run(['--help']); print(sorted(set(sys.modules) & {'numpy', 'torch', " \
           "'rich', 'onnxruntime', 'fastapi', 'sqlalchemy'}), file=sys.stderr)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
    assert "rollout" not in done.stderr and "export" in done.stdout
