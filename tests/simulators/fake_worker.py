"""A worker that speaks the agent's contract without an engine. Its bundle's graph.onnx says how it behaves (JSON):

    {"load": seconds, "golden": bool, "fatal": bool or the GPU it is fatal on, "lie": bool, "mute": bool,
     "build": bool, "fell_back": reason}

and its HTTP paths what it does: GET / answers {"version", "pid", "gpu"}; /fail answers 500 and counts as failed; /crash
dies if {"crash": true}; /slow takes a second; /window reports one window. Standard library only: it starts in 50 ms.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    given, _ = parser.parse_known_args()
    Worker(given.bundle, socket.socket(fileno=given.fd), socket.socket(fileno=given.control_fd)).run()


class Worker:
    def __init__(self, bundle: Path, public: socket.socket, control: socket.socket) -> None:
        self.public, self.control = public, control
        raw = (bundle / "manifest.json").read_bytes()
        self.manifest, self.digest = json.loads(raw), hashlib.sha256(raw).hexdigest()
        self.behaviour = json.loads((bundle / "graph.onnx").read_text())
        self.requests = self.failed = self.running = 0
        self.lock = threading.Lock()
        self.accepting = threading.Event()
        self.leaving = threading.Event()

    def send(self, kind: str, **fields: object) -> None:
        try:
            self.control.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")
        except OSError:
            self.leaving.set()

    def run(self) -> None:
        threading.Thread(target=self.listen, daemon=True).start()
        if self.behaviour.get("build"):
            self.send("building")
        time.sleep(self.behaviour.get("load", 0.0))
        if self.behaviour.get("fatal") in (True, os.environ.get("CUDA_VISIBLE_DEVICES", "cpu")):
            self.send("fatal", error={"code": "engine_error", "message": "weights are of the wrong shape"})
            sys.exit(1)
        if self.behaviour.get("mute"):
            self.leaving.wait()
            return
        golden = self.behaviour.get("golden", True)
        self.send("golden", ok=golden, max_error=0.01 if golden else 9.5, mean_error=0.001)
        engine = "0" * 64 if self.behaviour.get("lie") else self.manifest["engine_digest"]
        self.send(
            "ready", engine_digest=engine, manifest_sha256=self.digest, load_seconds=0.01, pid=os.getpid(),
            golden_tokens=12, max_error=0.01, mean_error=0.001, fell_back=self.behaviour.get("fell_back", ""), gpu="",
        )  # fmt: skip
        self.serve()
        self.send("drained")

    def listen(self) -> None:
        for line in self.control.makefile("rb"):
            kind = json.loads(line)["type"]
            if kind == "accept":
                self.accepting.set()
            else:
                self.leaving.set()
        self.leaving.set()

    def serve(self) -> None:
        while not self.accepting.wait(0.01):
            if self.leaving.is_set():
                return
        self.public.setblocking(False)
        while not self.leaving.is_set():
            try:
                connection, _ = self.public.accept()
            except OSError:
                time.sleep(0.005)
                continue
            with self.lock:
                self.running += 1
            threading.Thread(target=self.answer, args=(connection,)).start()
        time.sleep(0.3)  # as a real worker does for kept-alive clients; it still holds the port
        while self.running:
            time.sleep(0.01)

    def answer(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        with connection:
            head = connection.recv(65536).split(b"\r\n")[0].decode()
            path = head.split(" ")[1] if " " in head else "/"
            if path == "/crash" and self.behaviour.get("crash"):
                os._exit(139)
            if path == "/slow":
                time.sleep(1.0)
            if path == "/window":
                self.window()
            status = 500 if path == "/fail" and self.behaviour.get("fails", True) else 200
            gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            body = json.dumps({"version": self.manifest["version"], "pid": os.getpid(), "gpu": gpu}).encode()
            text = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall(text.encode() + body)
        with self.lock:
            self.running -= 1
            self.requests += 1
            self.failed += status == 500
            counts = {"requests": self.requests, "failed": self.failed, "running": self.running}
        self.send("stats", **counts, waiting=0, uptime_seconds=1.0, ttft_p50=0.02)

    def window(self) -> None:
        latency = {"counts": [0] * 26, "total": 0.0}
        self.send("window", window={
            "engine_digest": self.manifest["engine_digest"], "index": 0, "requests": 16, "failed": 0,
            "sketch": {"requests": 16}, "ttft": latency, "tpot": latency, "e2e": latency,
        })  # fmt: skip


if __name__ == "__main__":
    main()
