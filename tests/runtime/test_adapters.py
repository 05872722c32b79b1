"""Adapters that come and go over HTTP while an engine runs: names, slots, users, and what a batch may not mix."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skerry.core.errors import Conflict, IncompatibleError, InputError, NotFound
from skerry.kernels.adapters import AdapterSlots
from skerry.kernels.runner import Runner
from skerry.runtime.access import Access
from skerry.runtime.adapters import Adapters
from skerry.runtime.engine import run_to_completion
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.peft import read_peft
from skerry.runtime.peft_config import Base
from skerry.runtime.request import Request, SamplingParams
from skerry.runtime.scheduler import Limits
from skerry.runtime.server import Options
from tests.runtime.peft_folders import random_tensors, write_peft
from tests.runtime.test_peft import LAYOUT

RANK = 8


def fake_adapters(folder: Path | None, slots: int = 2) -> Adapters:
    return Adapters(AdapterSlots(LAYOUT, slots, RANK), Base(), folder)


def folders(root: Path, count: int, layout: Any = LAYOUT, **options: Any) -> list[Path]:
    """a0, a1, ... of different content below `root`."""
    return [write_peft(root / f"a{i}", random_tensors(layout, seed=i, **options)) for i in range(count)]


async def load(server: Any, name: str, path: str, **fields: Any) -> Any:
    return await server.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


async def unload(server: Any, name: str) -> Any:
    return await server.client.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def text(server: Any, **fields: Any) -> str:
    answer = (await server.chat(temperature=0, **fields)).json()
    return answer["choices"][0]["message"]["content"]


def test_an_adapter_is_loaded_used_listed_and_dropped(start, run, tmp_path):
    folders(tmp_path, 2)

    async def scenario() -> None:
        async with start(adapters=fake_adapters(tmp_path)) as server:
            base = await text(server)
            assert (await server.chat(model="tides")).status_code == 404
            loaded = await load(server, "tides", "a0")
            assert loaded.status_code == 200 and loaded.json()["rank"] == 4
            assert (await load(server, "org/other", str(tmp_path / "a1"))).status_code == 200
            answer = await server.chat(model="tides", temperature=0)
            assert answer.json()["model"] == "tides"
            texts = {base, answer.json()["choices"][0]["message"]["content"], await text(server, model="org/other")}
            assert len(texts) == 3 and await text(server) == base
            listed = (await server.client.get("/v1/models")).json()["data"]
            assert [one["id"] for one in listed] == ["tiny", "org/other", "tides"]
            assert [one.get("parent") for one in listed] == [None, "tiny", "tiny"]
            assert listed[2]["root"] == str(tmp_path / "a0")
            assert (await server.client.get("/v1/models/org/other")).json()["parent"] == "tiny"
            stream = await server.chat(model="tides", stream=True)
            assert '"model":"tides"' in stream.text and '"model":"tiny"' not in stream.text
            gone = await unload(server, "tides")
            assert gone.status_code == 200 and gone.json()["requests"] == 0
            missing = (await server.chat(model="tides")).json()["error"]
            assert missing["code"] == "model_not_found" and missing["param"] == "model"
            assert (await unload(server, "tides")).status_code == 404
            assert (await server.client.get("/v1/models/tides")).status_code == 404
            await server.idle()

    run(scenario())


def test_slots_are_counted_and_given_again(start, run, tmp_path):
    folders(tmp_path, 3)

    async def scenario() -> None:
        async with start(adapters=fake_adapters(tmp_path)) as server:
            for name in ("a0", "a1"):
                assert (await load(server, name, name)).status_code == 200
            full = await load(server, "a2", "a2")
            assert full.status_code == 409 and "all 2 slots are taken (" in full.json()["error"]["message"]
            full = await load(server, "a0", "a2", load_inplace=True)
            assert full.status_code == 409 and "needs one beside it" in full.json()["error"]["message"]
            for _ in range(5):
                assert (await unload(server, "a1")).status_code == 200
                assert (await load(server, "a2", "a2")).status_code == 200  # the slot is free by then
                assert (await unload(server, "a2")).status_code == 200
                assert (await load(server, "a1", "a1")).status_code == 200
            assert [one.name for one in server.service.adapters.loaded] == ["a0", "a1"]

    run(scenario())


def test_an_adapter_in_use_is_kept_until_its_last_request_ends(start, fake, run, tmp_path):
    folders(tmp_path, 2)

    async def scenario() -> None:
        adapters = fake_adapters(tmp_path, slots=1)
        async with start(fake(), adapters=adapters) as server:
            await load(server, "a0", "a0")
            alone = await text(server, model="a0", max_tokens=20)
            server.engine.gate.clear()
            running = asyncio.create_task(server.chat(model="a0", temperature=0, max_tokens=20))
            await server.until(lambda: server.service.loop.load().running == 1)
            slot = adapters.get("a0").slot
            assert (await unload(server, "a0")).json()["requests"] == 1
            assert (await server.chat(model="a0")).status_code == 404
            assert (await load(server, "a1", "a1")).status_code == 409
            assert slot in adapters._slots.loaded
            server.engine.gate.set()
            assert (await running).json()["choices"][0]["message"]["content"] == alone
            await server.until(lambda: slot not in adapters._slots.loaded)
            assert (await load(server, "a1", "a1")).status_code == 200

    run(scenario())


def test_a_step_that_still_reads_a_slot_is_waited_for(start, fake, run, tmp_path):
    """Its client has left: the request is over, and the step it is in is not."""
    folders(tmp_path, 1)

    async def scenario() -> None:
        adapters = fake_adapters(tmp_path)
        async with start(fake(), adapters=adapters) as server:
            await load(server, "a0", "a0")
            server.engine.gate.clear()
            running = asyncio.create_task(server.chat(model="a0", max_tokens=100))
            await server.until(lambda: server.service.loop._stepping)
            slot = adapters.get("a0").slot
            assert (await unload(server, "a0")).json()["requests"] == 1
            running.cancel()
            await server.until(lambda: server.service.loop.load().running == 0)
            await asyncio.sleep(0.05)
            assert slot in adapters._slots.loaded
            server.engine.gate.set()
            await server.until(lambda: slot not in adapters._slots.loaded)
            await server.until(lambda: len(adapters._free) == 2)

    run(scenario())


def test_a_name_keeps_its_content_unless_told_otherwise(start, fake, run, tmp_path):
    folders(tmp_path, 2)

    async def scenario() -> None:
        adapters = fake_adapters(tmp_path)
        async with start(fake(), adapters=adapters) as server:
            first = (await load(server, "a", "a0")).json()["digest"]
            old = await text(server, model="a", max_tokens=30)
            assert (await load(server, "a", "a0")).json()["digest"] == first  # the same again
            other = await load(server, "a", "a1")
            assert other.status_code == 409 and "with other content" in other.json()["error"]["message"]
            server.engine.gate.clear()
            running = asyncio.create_task(server.chat(model="a", temperature=0, max_tokens=30))
            await server.until(lambda: server.service.loop.load().running == 1)
            assert (await load(server, "a", "a1", load_inplace=True)).json()["digest"] != first
            server.engine.gate.set()
            assert (await running).json()["choices"][0]["message"]["content"] == old
            assert await text(server, model="a", max_tokens=30) != old
            await server.until(lambda: len(adapters._free) == 1)

    run(scenario())


def test_adapters_share_no_prefix(start, run, tmp_path):
    folders(tmp_path, 2)

    async def scenario() -> None:
        async with start(adapters=fake_adapters(tmp_path)) as server:
            await load(server, "a", "a0")
            await load(server, "b", "a1")
            said = "a prompt of several pages, the same for all"

            async def cached(model: str) -> int:
                usage = (await server.chat(said, model=model)).json()["usage"]
                return usage["prompt_tokens_details"]["cached_tokens"]

            for model in ("tiny", "a", "b"):
                assert await cached(model) == 0 < await cached(model)
            await unload(server, "a")
            await load(server, "a", "a1", load_inplace=True)
            assert await cached("a") > 0  # b's content under another name
            await unload(server, "b")
            await load(server, "b", "a0")
            assert await cached("b") > 0  # and what was a

    run(scenario())


@pytest.mark.faults("adapters that cannot be loaded")
@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"lora_name": None}, 400, "lora_name"), ({"lora_name": 5}, 400, "lora_name"),
        ({"lora_name": ""}, 400, "lora_name"),
        ({"lora_name": "a" * 129}, 400, "no name"), ({"lora_name": "a b"}, 400, "no name"),
        ({"lora_name": ".."}, 400, "no name"), ({"lora_name": "tiny"}, 409, "the model itself"),
        ({"lora_name": "skerry"}, 409, "the model itself"), ({"load_inplace": 1}, 400, "load_inplace"),
        ({"lora_path": None}, 400, "lora_path"), ({"lora_path": "a\0b"}, 400, "lora_path"),
        ({"lora_path": "\ud800"}, 400, "lora_path"), ({"lora_path": "x" * 5000}, 400, "lora_path"),
        ({"lora_path": "x" * 4000}, 400, "File name too long"), ({"lora_path": "none"}, 404, "no adapter_config"),
        ({"lora_path": "../a0"}, 400, "outside"), ({"lora_path": "/etc"}, 400, "outside"),
        ({"lora_path": "link"}, 400, "outside"), ({"lora_path": "wide"}, 409, "rank 9"),
        ({"lora_path": "inf"}, 409, "not finite"), ({"lora_path": "bin"}, 400, "pickle"),
    ],
)  # fmt: skip
def test_bad_requests_change_nothing(start, run, tmp_path, fields, status, words):
    inside = tmp_path / "inside"
    folders(inside, 1)
    write_peft(inside / "wide", random_tensors(LAYOUT, rank=9), r=9)
    write_peft(inside / "inf", random_tensors(LAYOUT, size=np.inf))
    write_peft(inside / "bin", random_tensors(LAYOUT))
    (inside / "bin/adapter_model.safetensors").rename(inside / "bin/adapter_model.bin")
    (inside / "link").symlink_to(write_peft(tmp_path / "secret", random_tensors(LAYOUT)))

    async def scenario() -> None:
        adapters = fake_adapters(inside)
        async with start(adapters=adapters) as server:
            body = json.dumps({"lora_name": "a", "lora_path": "a0", **fields})
            answer = await server.client.post("/v1/load_lora_adapter", content=body)
            assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
            assert adapters.loaded == [] and len(adapters._free) == 2 and not adapters._slots.loaded
            assert (await load(server, "a", "a0")).status_code == 200

    run(scenario())


def test_who_may_load(start, run, tmp_path):
    folders(tmp_path, 1)
    body = {"lora_name": "a", "lora_path": "a0"}

    async def status(options: Options, key: str, folder: Path | None = tmp_path) -> list[int]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with start(options=options, adapters=fake_adapters(folder)) as server:
            found = []
            for path in ("load", "unload"):
                answer = await server.client.post(f"/v1/{path}_lora_adapter", json=body, headers=headers)
                found.append(answer.status_code)
            return found

    async def scenario() -> None:
        both = Options(Access((b"api", b"second"), (b"root",)))
        assert await status(both, "root") == [200, 200]
        assert await status(both, "api") == await status(both, "second") == [403, 403]
        assert await status(both, "wrong") == await status(both, "") == [401, 401]
        assert await status(Options(Access((b"api",))), "api") == [403, 403]  # an admin key there is not
        assert await status(Options(Access((), (b"root",))), "") == [401, 401]
        assert await status(Options(Access((), (b"root",))), "root") == [200, 200]
        assert await status(Options(), "") == [200, 200]
        assert await status(Options(), "", None) == await status(both, "root", None) == [403, 403]

    run(scenario())


def test_an_engine_without_slots_says_how_to_get_them(start, bundles, run, tmp_path):
    folders(tmp_path, 1)

    async def scenario() -> None:
        async with start(adapters=Adapters(None, Base(), tmp_path)) as server:
            answer = await load(server, "a", "a0")
            message = answer.json()["error"]["message"]
            assert answer.status_code == 409 and "opened without slots" in message and "--adapter-slots" in message
            assert "lora_requests_info" not in (await server.client.get("/metrics")).text

    run(scenario())
    with pytest.raises(IncompatibleError, match="its graph takes no adapters") as caught:
        Runner.open(bundles(), pages=4, adapter_slots=1)
    assert "--adapters" in caught.value.hint


def test_metrics_name_the_adapters_in_use(start, fake, run, tmp_path):
    folders(tmp_path, 2)

    async def scenario() -> None:
        limits = Limits(rows=1)
        async with start(fake(), limits=limits, adapters=fake_adapters(tmp_path)) as server:
            await load(server, "a", "a0")
            await load(server, "b", "a1")

            async def line() -> str:
                page = (await server.client.get("/metrics")).text.splitlines()
                return next(one for one in page if one.startswith("vllm:lora_requests_info{"))

            assert 'running_lora_adapters="",waiting_lora_adapters=""' in await line()
            server.engine.gate.clear()
            tasks = [asyncio.create_task(server.chat(model="a"))]
            await server.until(lambda: server.service.loop.load().running == 1)
            tasks.append(asyncio.create_task(server.chat(model="b")))
            await server.until(lambda: server.service.loop.load().waiting == 1)
            labels = 'max_lora="2",running_lora_adapters="a",waiting_lora_adapters="b"'
            assert (await line()).startswith(f"vllm:lora_requests_info{{{labels}}}")
            server.engine.gate.set()
            await asyncio.gather(*tasks)

    run(scenario())


def test_llama_cpps_field_stays_refused(start, run, tmp_path):
    async def scenario() -> None:
        async with start(adapters=fake_adapters(tmp_path)) as server:
            assert (await server.chat(lora=[{"id": 0, "scale": 1}])).json()["error"]["param"] == "lora"

    run(scenario())


@pytest.fixture(scope="module")
def roomy(bundles: Any) -> Path:
    return bundles("int8", adapters=True)


def open_engine(bundle: Path, slots: int = 4, pages: int = 96, threads: int = 2) -> OrtEngine:
    return OrtEngine(Runner.open(bundle, threads=threads, pages=pages, adapter_slots=slots, adapter_rank=RANK))


def mixed(seed: int, slots: int, count: int = 8) -> list[Request]:
    """Requests that differ in adapter, length, seed and sampling."""
    rng = random.Random(seed)
    return [
        Request(
            tuple(rng.randrange(97, 122) for _ in range(rng.randrange(1, 70))), rng.randrange(3, 40),
            SamplingParams(temperature=rng.choice([0.0, 0.7, 1.2]), seed=rng.getrandbits(64)),
            adapter=i % (slots + 1) - 1, scope=bytes([i % (slots + 1)]),
        )
        for i in range(count)
    ]  # fmt: skip


def test_eight_requests_of_different_adapters_answer_as_each_alone(roomy, tmp_path):
    engine = open_engine(roomy)
    layout = engine.adapters.layout
    for slot, folder in enumerate(folders(tmp_path, 4, layout, rank=4)):
        engine.adapters.load(slot, read_peft(folder, "a", layout, RANK).deltas)
    requests = mixed(1, 4)
    assert {one.adapter for one in requests} == {-1, 0, 1, 2, 3}
    alone = [run_to_completion(engine, [one])[0] for one in requests]
    assert run_to_completion(engine, requests) == alone
    assert run_to_completion(engine, requests[::-1], Limits(prefill_tokens=7, rows=5)) == alone[::-1]
    greedy = SamplingParams(temperature=0.0)
    crossed = [Request(requests[0].prompt, 12, greedy, adapter=slot, scope=bytes([slot + 1])) for slot in range(-1, 4)]
    assert len({tuple(run_to_completion(engine, [one])[0]) for one in crossed}) == 5  # or the test would see nothing


@pytest.mark.faults("adapters loaded, replaced and dropped under load")
def test_adapters_come_and_go_under_load(roomy, start, tokenizer, run, tmp_path):
    """Twelve clients, each with its own adapter or none, while others are loaded, replaced and dropped."""
    engine = open_engine(roomy, slots=4)
    layout = engine.adapters.layout
    folders(tmp_path, 6, layout)

    async def scenario() -> None:
        adapters = Adapters(engine.adapters, Base(), tmp_path)
        async with start(engine, adapters=adapters) as server:
            for name in ("a0", "a1"):
                assert (await load(server, name, name)).status_code == 200
            models = ["tiny", "a0", "a1"]

            async def ask(number: int) -> str:
                body = {"model": models[number % 3], "prompt": f"request {number} ", "seed": number, "max_tokens": 24}
                answer = await server.client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"][0]["text"]

            alone = [await ask(number) for number in range(12)]
            assert len(set(alone)) == 12
            stop = asyncio.Event()
            changes = [0]

            async def churn() -> None:
                while not stop.is_set():
                    name = f"a{2 + changes[0] % 4}"
                    loaded = await load(server, "guest", name, load_inplace=True)
                    assert loaded.status_code == 200, loaded.text
                    task = asyncio.create_task(server.chat("hello", model="guest", max_tokens=8))
                    await asyncio.sleep(0)
                    if changes[0] % 2:
                        assert (await unload(server, "guest")).status_code == 200
                    assert (await task).status_code in (200, 404)
                    changes[0] += 1

            churning = asyncio.create_task(churn())
            rounds = 0
            while rounds < 3 or changes[0] < 4:
                assert list(await asyncio.gather(*map(ask, range(12)))) == alone
                rounds += 1
            stop.set()
            await churning
            assert server.engine is engine and server.fatal == []
            await server.idle()
            for one in list(adapters.loaded):
                adapters.unload(one.name)
            await server.until(lambda: len(adapters._free) == 4)
            assert not engine.adapters.loaded and not engine.adapters.values.any()

    run(scenario())


def test_an_adapter_of_the_peft_library_answers_like_the_merged_model(roomy, checkpoint, tmp_path):
    """Names, ranks and scales: against torch's float32 with the adapter merged in, the loss is that of 8 bits alone."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

    def model() -> Any:
        config = transformers.LlamaConfig.from_pretrained(checkpoint)
        return transformers.LlamaForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        rank_pattern={"k_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"down_proj": 3, "^model.layers.0.self_attn.q_proj": 12},
    )  # fmt: skip
    wrapped = peft.get_peft_model(model(), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = np.random.default_rng(1).integers(97, 122, 40).tolist()
    with torch.no_grad():
        base = model()(torch.tensor([ids])).logits[0].numpy()
        merged = wrapped.merge_and_unload()(torch.tensor([ids])).logits[0].numpy()
    engine = open_engine(roomy, slots=1)
    found = read_peft(tmp_path / "adapter", "made", engine.adapters.layout, RANK)
    assert len(found.deltas) == 21 and found.rank == 7

    def logits(adapter: int) -> np.ndarray:
        from skerry.kernels.runner import Row, pack_rows

        rows = [Row(ids, 0, [[0, 1, 2]] * engine._runner.groups, range(len(ids)), adapter=adapter)]
        return engine._runner.step(pack_rows(rows, engine.page_size))

    engine.adapters.load(0, found.deltas)
    loss, adapted = np.abs(logits(-1) - base).mean(), np.abs(logits(0) - merged).mean()
    effect = np.abs(merged - base).mean()
    print(f"mean |logit - float32's|: base {loss:.4f}, adapted {adapted:.4f}; the adapter changes {effect:.3f}")
    assert adapted < 1.5 * loss < 0.15 * effect, (adapted, loss, effect)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"):
        a, b, scale = found.deltas[name]
        engine.adapters.load(0, found.deltas | {name: (a, b, scale * 1.5)})
        assert np.abs(logits(0) - merged).mean() > 1.5 * adapted, name  # so a wrong scale would show


def test_names_of_the_base_and_errors_of_loading(run, tmp_path):
    folders(tmp_path, 1)

    async def scenario() -> None:
        adapters = fake_adapters(None)
        adapters.reserved = ("tiny",)
        with pytest.raises(Conflict, match="the model itself"):
            await adapters.load("tiny", tmp_path / "a0")
        with pytest.raises(InputError, match="no name"):
            await adapters.load("", tmp_path / "a0")
        with pytest.raises(NotFound, match=r"load adapter x: no adapter_config.json"):
            await adapters.load("x", tmp_path / "none")
        with pytest.raises(NotFound, match="unload adapter x"):
            adapters.unload("x")
        first = await adapters.load("x", tmp_path / "a0")
        shutil.rmtree(tmp_path / "a0")
        with pytest.raises(NotFound):
            await adapters.load("x", tmp_path / "a0", replace=True)
        assert adapters.get("x") is first
        lease = adapters.lease("x")
        lease.release()
        lease.release()
        assert first.users == 0 and adapters.lease("y").adapter is None

    run(scenario())
