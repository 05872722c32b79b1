"""The loop, told in order: every step is a command that an operator could type, run as a process of its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skerry.core.errors import DeadlineExceeded, SkerryError
from skerry.core.files import read_json
from skerry.trainer.demo.faults import corrupt_checkpoint, spoil_rotary_tables
from skerry.trainer.demo.fleetview import FleetView
from skerry.trainer.demo.processes import Processes, command, follow, free_port, wait_until
from skerry.trainer.demo.settings import Settings
from skerry.trainer.demo.timeline import Timeline, bar
from skerry.trainer.demo.traffic import Plan, Traffic

NODES = ("skerry-1", "skerry-2", "skerry-3")
# Two domains that users ask about, and a third that nobody does: the fleet has to tell them apart.
SOURCES = ("stdlib", "numpy", "matplotlib")


class Story:
    """Holds what later steps need of earlier ones. Each public method is one stage."""

    def __init__(self, workdir: Path, settings: Settings, processes: Processes, timeline: Timeline) -> None:
        self.dir, self.settings, self.processes, self.timeline = workdir, settings, processes, timeline
        self.log = workdir / "logs" / "commands.log"
        self.facts: dict[str, Any] = {"gate": {}, "canary": {}, "parity": {}, "drift": {}}
        self.scores: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.fleet: FleetView
        self.traffic: Traffic

    def command(self, *words: object, ok: Sequence[int] = (0,), timeout: float = 3600) -> dict[str, Any]:
        return command([str(word) for word in words], self.log, ok, timeout)

    def operate(self, *words: object, ok: Sequence[int] = (0,), timeout: float = 600) -> dict[str, Any]:
        connection = ("--server", self.fleet.server, "--token-file", self.dir / "fleet" / "admin.token")
        return self.command(*words, *connection, ok=ok, timeout=timeout)

    # -- train and compile ------------------------------------------------------------------------------------------

    def build_data(self) -> None:
        """Three versioned datasets out of the docstrings that this machine has."""
        for name in SOURCES:
            origin = ("--stdlib",) if name == "stdlib" else ("--package", name)
            built = self.command(
                "data", "build", name, "--source", "python-docs", *origin, "--store", self.dir / "data",
                "--max-rows", self.settings.rows, "--base", self.settings.base,
            )  # fmt: skip
            self.facts.setdefault("data", {})[name] = built
            self.timeline.note(f"{name}: {built['train']} training rows, {built['holdout']} held out")

    def dataset(self, name: str) -> Path:
        return Path(self.facts["data"][name]["path"])

    def train_v1(self) -> None:
        settings = self.settings
        done = self.command(
            "train", "--base", settings.base, "--data", self.dataset("stdlib"), "--out", self.dir / "checkpoints/v1",
            "--steps", settings.steps[0], "--batch", settings.batch, "--max-tokens", settings.max_tokens,
            "--lr", settings.learning_rate, "--version", "v1", "--holdout", f"numpy={self.dataset('numpy')}",
        )  # fmt: skip
        before, after = done["nll"]["before"]["stdlib"], done["nll"]["after"]["stdlib"]
        self.timeline.note(f"v1: holdout NLL of stdlib {before:.3f} -> {after:.3f}", "good")

    def export_v1(self) -> None:
        self.export("v1")

    def export(self, version: str, ok: Sequence[int] = (0,)) -> dict[str, Any]:
        return self.command("export", self.dir / "checkpoints" / version, "--target", "ort-cpu", "--precision",
                            self.settings.precision, "--out", self.dir / "bundles" / version, "--version", version,
                            ok=ok)  # fmt: skip

    # -- the fleet --------------------------------------------------------------------------------------------------

    def start_fleet(self) -> None:
        """A control plane and three agents, each enrolled with a one-time token."""
        home = self.dir / "fleet"
        self.command("fleet", "init", "--dir", home)
        port = free_port()
        server = f"http://127.0.0.1:{port}"
        self.fleet = FleetView(server, home / "admin.token")
        self.processes.start("fleet", [
            "fleet", "serve", "--dir", str(home / "server"), "--port", str(port), "--poll-seconds", "1",
            "--window-requests", str(self.settings.window_requests), "--no-zeroconf",
        ])  # fmt: skip
        wait_until("the control plane", self.fleet.ready, self.processes, 60)
        self.timeline.note(f"control plane at {server}")
        for name in SOURCES:
            self.operate("fleet", "source", "add", name, "--sketch", self.dataset(name) / "sketch.json")
        urls = {name: self._start_node(name) for name in NODES}
        self.traffic = Traffic(urls, self.timeline.began, self.settings.users_per_node)
        self.traffic.start()

    def _start_node(self, name: str) -> str:
        home = self.dir / "nodes" / name
        home.mkdir(parents=True)
        self.operate("fleet", "token", "create", "--uses", 1, "--out", home / "token")
        self.command("node", "join", self.fleet.server, "--token-file", home / "token", "--dir", home, "--name", name)
        port, admin = free_port(), free_port()
        self.processes.start(name, [
            "node", "run", "--dir", str(home), "--port", str(port), "--admin-port", str(admin), "--threads", "1",
        ])  # fmt: skip
        self.timeline.note(f"{name} enrolled, serving on port {port}")
        return f"http://127.0.0.1:{port}"

    def roll_out_v1(self) -> None:
        self.publish("v1")
        self.rollout("v1", soak=0)
        self.timeline.note("v1 on all nodes", "good")
        answer = self.chat_once("What does json.dumps do?")
        self.timeline.note(f"skerry-1 answers through the openai client: {answer!r}")

    def publish(self, version: str) -> None:
        self.operate("fleet", "release", "publish", self.dir / "bundles" / version, "--version", version,
                     "--publisher", self.dir / "fleet" / "publisher")  # fmt: skip

    def rollout(self, version: str, soak: int, ok: Sequence[int] = (0,)) -> dict[str, Any]:
        """Canary of one, then everybody; waits for the end."""
        return self.operate("fleet", "rollout", "start", version, "--waves", "1,100%", "--soak-requests", soak,
                            "--soak-seconds", 0, "--wave-deadline", 300, "--watch", ok=ok, timeout=900)  # fmt: skip

    def chat_once(self, question: str) -> str:
        from openai import OpenAI

        client = OpenAI(base_url=f"{self.traffic.urls[NODES[0]]}/v1", api_key="none", timeout=60)
        answer = client.chat.completions.create(
            model="skerry", messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
        )
        return (answer.choices[0].message.content or "")[:80]

    # -- traffic and drift ------------------------------------------------------------------------------------------

    def questions(self, name: str) -> list[str]:
        """What the holdout's users ask: never seen in training."""
        rows = (self.dataset(name) / "holdout.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["messages"][0]["content"] for row in rows]

    def plan(self, phase: str, name: str) -> Plan:
        return Plan(phase, self.questions(name), self.settings.answer_tokens)

    def serve_calm(self) -> None:
        """Traffic as the model was made for: windows fill, and no alarm may be raised."""
        self.traffic.ask(self.plan("calm", "stdlib"))
        wanted = self.settings.calm_windows
        with bar() as show:

            def filled() -> bool:
                slowest = min(self.windows().values())
                show("windows on the slowest node", slowest, wanted)
                return slowest >= wanted

            wait_until("calm windows", filled, self.processes, 600, period=0.5)
        alarms = sum(point["alarmed"] for point in self.scores.values())
        self.facts["drift"]["false_alarms"] = alarms
        self.timeline.note(f"{sum(self.windows().values())} windows, {alarms} alarms", "bad" if alarms else "good")

    def shift(self) -> None:
        """Users move to the second domain; the fleet has to notice from sketches alone."""
        before = self.windows()
        shift = max(before.values())
        self.facts["drift"].update(shift_window=shift, shift_windows=before)
        self.traffic.ask(self.plan("shifted", "numpy"))
        self.timeline.note(f"users move to numpy after window {shift}")
        limit = self.settings.alarm_windows
        with bar() as show:

            def alarmed() -> bool:
                now = self.windows()
                show("windows since the shift", max(now.values()) - shift, limit)
                if min(count - before[node] for node, count in now.items()) > limit + 2:
                    raise DeadlineExceeded("wait", "drift alarm", f"none within {limit} windows of the shift")
                return bool(self.fleet.retrain_requests())

            wait_until("the drift alarm", alarmed, self.processes, 600, period=0.5)
        request = self.fleet.retrain_requests()[0]
        alarm = max(request["detectors"][node]["alarm_window"] for node in request["alarmed_nodes"])
        self.facts["drift"].update(alarm_window=alarm, source=request["source"], ranking=request["sources"])
        self.timeline.note(f"quorum alarm at window {alarm}: retrain on {request['source']}", "good")
        self.traffic.ask(None)

    def windows(self) -> dict[str, int]:
        """Windows of the serving release that the control plane has judged, by node; scores are kept for the plot."""
        found = dict.fromkeys(NODES, 0)
        status = self.fleet.drift()
        for row in status["nodes"]:
            for point in row["history"]:
                key = (row["release"], row["name"], point["window"])
                self.scores[key] = {"evidence": point["statistic"] or 0.0, "alarmed": bool(point["alarmed"])}
            if row["release"] == status["release"]:
                found[row["name"]] = int(row["windows"])
        return found

    # -- retrain ----------------------------------------------------------------------------------------------------

    def gates(self) -> Path:
        """Wide enough for a machine that also runs a whole fleet: a retrained engine is as fast as the last."""
        path = self.dir / "gates.toml"
        path.write_text('[gates]\nmetrics = ["tpot", "e2e"]\nbudget = 0.25\nblocks = 8\nmax_blocks = 16\n')
        return path

    def retrain(self) -> None:
        """The pipeline turns the request into a rollout; users come back while v2 goes out."""
        settings = self.settings
        sources = self.dir / "sources.toml"
        sources.write_text("".join(
            f'[source.{name}]\n' + ("stdlib = true\n" if name == "stdlib" else f'packages = ["{name}"]\n')
            for name in SOURCES
        ))  # fmt: skip
        words = [
            "pipeline", "run", "--once", "--fleet", self.fleet.server, "--token-file", self.dir / "fleet/admin.token",
            "--workdir", self.dir / "pipeline", "--sources", sources, "--store", self.dir / "data",
            "--champion", self.dir / "checkpoints/v1", "--champion-data", self.dataset("stdlib"),
            "--checkpoints", self.dir / "checkpoints", "--bundles", self.dir / "bundles",
            "--publisher", self.dir / "fleet/publisher", "--version", "v2", "--steps", settings.steps[1],
            "--batch", settings.batch, "--max-tokens", settings.max_tokens, "--lr", settings.learning_rate,
            "--replay", settings.replay, "--precision", settings.precision, "--soak-requests", settings.soak_requests,
            "--soak-seconds", 5, "--gates", self.gates(), "--champion-bundle", self.dir / "bundles/v1",
        ]  # fmt: skip
        child = self.processes.start("pipeline", [str(word) for word in words])

        def users_come_back() -> None:
            self.windows()
            if not self.traffic.asked and len(self.fleet.rollouts()) > 1:
                self.timeline.note("v2 passed its gates; its rollout begins, users are back")
                self.traffic.ask(self.plan("rollout_v2", "numpy"))

        follow(child, self.dir / "logs" / "pipeline.log", 3600, "pipeline", users_come_back)
        self.processes.forget("pipeline")
        if child.returncode != 0:
            raise SkerryError("run", "pipeline", f"exit code {child.returncode}", f"read {self.dir}/logs/pipeline.log")
        self.timeline.note("v2 on all nodes", "good")
        self.traffic.ask(None)

    # -- bad releases -----------------------------------------------------------------------------------------------

    def refuse_v3(self) -> None:
        """Weights gone bad before they were hashed: only the export gate can tell."""
        corrupt_checkpoint(self.dir / "checkpoints/v2", self.dir / "checkpoints/v3")
        done = self.export("v3", ok=(0, 3))
        accepted = done["exit_code"] == 0
        reason = "accepted" if accepted else done["error"]["message"]
        self.facts["gate"]["v3"] = {"accepted": accepted, "reason": reason}
        self.timeline.note(f"v3: {reason}", "bad" if accepted else "good")

    def revert_v4(self) -> None:
        """Sound on every text the gate reads, broken on the first long prompt: only the canary can tell."""
        bundle = self.dir / "bundles"
        spoil_rotary_tables(bundle / "v2", bundle / "v4", "v4", self.settings.defect_rows)
        measured = [self.command("eval", bundle / version, self.dir / "checkpoints/v2/eval/parity.jsonl")["nll"]
                    for version in ("v2", "v4")]  # fmt: skip
        self.facts["canary"]["v4_gate"] = {"nll_v2": measured[0], "nll_v4": measured[1]}
        self.timeline.note(f"v4 passes the gate: NLL {measured[1]:.4f} against v2's {measured[0]:.4f}")
        self.publish("v4")
        plan = self.plan("canary_v4", "numpy")
        plan.long_share, plan.long_text = 0.25, self.long_text()
        self.traffic.ask(plan)
        done = self.rollout("v4", soak=self.settings.soak_requests, ok=(0, 3))
        rollout = done.get("rollout") or self.fleet.rollouts()[-1]
        self.facts["canary"]["v4"] = {"state": rollout["state"], "reason": rollout["reason"],
                                      "seconds_to_revert": round(float(rollout["seconds"]), 1)}  # fmt: skip
        self.timeline.note(f"v4: {rollout['state']}: {rollout['reason']}", "good" if done["exit_code"] == 3 else "bad")
        time.sleep(2)
        self.traffic.ask(None)

    def long_text(self) -> str:
        """More tokens than the defective tables hold."""
        rows = (self.dataset("stdlib") / "train.jsonl").read_text(encoding="utf-8").splitlines()
        text = " ".join(json.loads(row)["messages"][-1]["content"] for row in rows[:400])
        return text[: self.settings.defect_rows * 6]

    # -- the end ----------------------------------------------------------------------------------------------------

    def node_states(self) -> list[dict[str, Any]]:
        keys = ("name", "release", "observed_digest")
        return [{key: node[key] for key in keys} for node in self.fleet.nodes()]

    def nll(self) -> dict[str, dict[str, float]]:
        """Nats per answer token on the holdouts as training measured them: domain one is stdlib, domain two numpy."""
        first, second = (read_json(self.dir / "checkpoints" / v / "checkpoint.json")["eval"] for v in ("v1", "v2"))
        return {
            domain: {"base": first["before"][name], "v1": second["before"][name], "v2": second["nll"][name]}
            for domain, name in (("domain_one", "stdlib"), ("domain_two", "numpy"))
        }

    def losses(self) -> dict[str, list[tuple[int, float]]]:
        """Training loss by step, from each run's log."""
        found = {}
        for version in ("v1", "v2"):
            lines = (self.dir / "checkpoints" / version / "train_log.jsonl").read_text(encoding="ascii").splitlines()
            found[version] = [(int(row["step"]), float(row["loss"])) for row in map(json.loads, lines)]
        return found

    def rollout_rows(self) -> list[dict[str, Any]]:
        return [
            {"release": r["release"], "state": r["state"], "waves": r["wave"] + 1, "seconds": round(r["seconds"], 1)}
            for r in self.fleet.rollouts()
        ]

    def stop_traffic(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.stop()

    def parity(self, version: str) -> dict[str, float]:
        measured = read_json(self.dir / "bundles" / version / "parity.json")
        return {key: float(measured[key]) for key in ("ppl_ratio", "kl", "top1")}

    def prompts_found(self) -> int:
        """How many of the prompts that users sent can be read anywhere in the control plane's store."""
        server = self.dir / "fleet" / "server"
        store = b"".join(path.read_bytes() for path in server.iterdir() if path.is_file())
        return sum(prompt.encode() in store or json.dumps(prompt).encode() in store for prompt in self.traffic.prompts)

    def window_bytes(self) -> int:
        """The largest window any node sent, as JSON bytes."""
        return int(self.fleet.drift()["largest_window_bytes"])


def clean(workdir: Path) -> None:
    """Removes what an earlier demo left in `workdir`, and nothing else; its processes must have ended."""
    for name in ("data", "checkpoints", "bundles", "fleet", "nodes", "pipeline", "logs"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    for name in ("result.json", "report.html", "traffic.jsonl", "sources.toml"):
        (workdir / name).unlink(missing_ok=True)
    (workdir / "logs").mkdir(parents=True)
