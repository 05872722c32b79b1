"""`make gpu-check`: tests and measures the GPU kernels, and a whole model where it is given one; writes
benchmarks/results/gpu-DATE-DEVICE.json.

Started by scripts/gpu_check.sh, which has built the checkout. Needs no package beyond numpy, pytest and CuPy; what else
is used where it is found (torch, compute-sanitizer, ONNX Runtime, TensorRT-RTX) is named where it is missing.

Exit codes: 0 tests passed and every must was met; 1 a test or an operation failed, or there is no GPU; 2 usage; 3 a
must was missed; 6 none was missed, and some could not be measured. (make itself says 2 for each of them.)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skerry.benchmarks.documents import close_document, new_document
from skerry.benchmarks.kernels.gpu import model, rtx
from skerry.benchmarks.kernels.gpu.found import Found, look
from skerry.benchmarks.kernels.gpu.model_chat import lacking
from skerry.benchmarks.targets import MISSED, UNKNOWN, Target, read_targets, stand
from skerry.core.errors import GateFailed, Inconclusive, SkerryError, Unavailable
from skerry.core.files import write_json
from skerry.kernels.device_arrays import GpuArrays

ROOT = Path(__file__).resolve().parents[3]
SECTION, RUN = "Kernels on an H200", "kernels"  # in targets.toml
# Of those, the tests whose id has "gpu", or "emulated"; what needs a package that is not there skips itself.
TESTS = tuple(f"tests/kernels/test_{what}*.py" for what in ("cuda_", "ort_cuda", "tensorrt"))
MODEL_TESTS = "tests/benchmarks/test_model_emulated.py"  # of the part that is given a bundle
RTX_TESTS, PAGED_TESTS = "tests/exporter/test_tensorrt_rtx.py", "tests/exporter/test_tensorrt_gpu.py"
EXPORTING = ("click", "onnx_ir", "torch", "transformers")  # which those tests do first
SANITIZED = "sanitized"  # marks the small tests that are run again under compute-sanitizer
SANITIZERS = ("memcheck", "racecheck")
TEST_SECONDS, SANITIZER_SECONDS = 1800.0, 900.0
OPS = ("paged_attention", "sample")


def main(words: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(words)
    try:
        model.check_bundles(args.bundle, args.reference)
        found = look()
        found.missing |= model.missing(args.bundle, args.reference)
        print(plan(found, args.repeats, args.bundle), file=sys.stderr, flush=True)
        if args.dry_run:
            tests = run_tests("emulated", only=args.only)
            print(f"dry run: nothing was measured; emulated tests: {tests['summary']}")
            return 0 if passed(tests) else 1
        if found.device is None:
            cause = f"{found.missing['a CUDA device']}; nothing was measured"
            raise Unavailable("check GPU", "", cause, "run it where there is a GPU, or make gpu-check ARGS=--dry-run")
        settings = {name: getattr(args, name) for name in ("repeats", "seed", "bundle", "reference")}
        document = new_document(
            "gpu", subject={"device": found.device}, settings=settings, figures={}, rows=[], versions=found.versions,
            missing=found.missing, tests={}, sanitizers={}, tensorrt_rtx={}, tensorrt={}, model={}, targets=[],
            failures=[],
        )  # fmt: skip
        try:
            check(document, found, args.only)
        finally:  # whatever ended it: what was found is kept
            path = args.out / f"gpu-{datetime.now(UTC):%Y-%m-%d}-{found.slug()}.json"
            write_json(path, close_document(document))
            print("\n".join([table(document), *model.lines(document), "", f"written to {path}"]))
        conclude(document)
    except SkerryError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Error: check GPU: interrupted", file=sys.stderr)
        return 130
    return 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make gpu-check ARGS=...", description=(__doc__ or "").split(";")[0])
    parser.add_argument("--dry-run", action="store_true", help="build, say what would run, run the emulated tests")
    parser.add_argument("--only", default="", metavar="WORDS", help="of the tests: those that pytest -k WORDS selects")
    parser.add_argument("--bundle", metavar="DIR", help="an ort-cuda engine, to run as a whole model")
    parser.add_argument("--reference", metavar="DIR", help="its checkpoint as ort-cpu fp32: what to agree with")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement; 6 and up give intervals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    return parser


def plan(found: Found, repeats: int, bundle: str | None = None) -> str:
    """What would run here, and what is left out because something is missing."""
    device = found.device or {}
    lines = [
        f"device: {device.get('name', 'none')}",
        "found: " + (", ".join(f"{name} {version}" for name, version in found.versions.items()) or "nothing"),
        *(f"missing: {name} ({use})" for name, use in found.missing.items()),
        f"1. tests on the device: {' '.join(TESTS)}",
        f"2. compute-sanitizer, {' and '.join(SANITIZERS)}, on the tests marked {SANITIZED}",
        "3. ceilings: device copy, bf16 product",
        f"4. rows of {', '.join(OPS)}, {repeats} repeats, L2 overwritten before each call",
        f"5. a whole model: {f'chat, agreement, tokens a second of {bundle}' if bundle else 'left out, no --bundle'}",
        "6. TensorRT-RTX: whether it runs on this device, and its test where it does; TensorRT's where it is installed",
        "7. the targets:",
        *(f"   {target.measure}: {'>=' if target.better == 'higher' else '<='} {target.must:g} {target.unit}"
          for target in gpu_targets()),
    ]  # fmt: skip
    return "\n".join(lines)


def gpu_targets() -> list[Target]:
    return [target for target in read_targets() if target.section == SECTION]


def check(document: dict[str, Any], found: Found, only: str) -> None:
    """Everything, on the device; fills the document as it goes. What fails is in it and does not stop the rest."""
    from skerry.benchmarks.kernels.gpu.bench import PEERS, open_bench
    from skerry.benchmarks.kernels.gpu.level import measure
    from skerry.benchmarks.kernels.setting import Setting

    document["tests"] = run_tests("gpu", only=only)
    if "compute-sanitizer" in found.versions:
        document["sanitizers"] = {tool: sanitize(tool) for tool in SANITIZERS}
    if "tensorrt-rtx" in found.versions:
        document["tensorrt_rtx"] = try_rtx((found.device or {})["sm"], found)
    if "tensorrt" in found.versions:
        document["tensorrt"] = exporter_tests(PAGED_TESTS, found)
    settings = document["settings"]
    setting = Setting(1, settings["seed"], PEERS, None, lambda line: print(f"gpu-check: {line}", file=sys.stderr))
    failed: list[SkerryError] = []
    try:
        bench = open_bench(found, setting)
        failed += measure(document, bench, OPS, settings["repeats"])
        bench.release()
        if settings["bundle"] and model.can_run(GpuArrays.provider):
            failed += model.measure(
                document, settings["bundle"], settings["reference"], GpuArrays(), "cuda" if bench.torch else "",
                setting, settings["repeats"],
            )  # fmt: skip
    except SkerryError as error:
        failed.append(error)
    document["failures"] = [str(error) for error in failed]
    document["targets"] = [stand(target, {RUN: document}).to_json() for target in gpu_targets()]


def try_rtx(sm: int, found: Found) -> dict[str, Any]:
    """What the library says of this device; where an engine opens, its test too."""
    made: dict[str, Any] = {"tried": rtx.tried(sm)}
    if any(rtx.OPENED in said for said in made["tried"].values()):
        made |= exporter_tests(RTX_TESTS, found)
    return made


def exporter_tests(file: str, found: Found) -> dict[str, Any]:
    """{"tests": its test on the device}; nothing where what exports a model is missing, which is then named."""
    if lacking(EXPORTING):
        found.missing |= dict.fromkeys(lacking(EXPORTING), f"{file} on the device")
        return {}
    return {"tests": run_tests("on_a_gpu", files=(file,))}


def run_tests(
    device: str, wrapper: Sequence[str] = (), marker: str = "", only: str = "", seconds: float = TEST_SECONDS,
    files: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """pytest in a process of its own, on the `gpu` or `emulated`, without whatever plugins are lacking."""
    patterns = files or (*TESTS, *([MODEL_TESTS] if device == "emulated" else []))
    files = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    words = [*wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    words += ["-k", f"{device} and ({only})" if only else device]
    words += ["-m", marker] if marker else []
    print(f"gpu-check: {' '.join(words)}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"exit_code": None, "summary": f"took longer than {seconds:g} s"}
    print(done.stdout, file=sys.stderr, flush=True)
    lines = done.stdout.strip().splitlines()
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "pytest said nothing"}


def passed(tests: dict[str, Any]) -> bool:
    """Some did, and none failed: where all are skipped, nothing was tested."""
    return tests.get("exit_code") == 0 and " passed" in tests["summary"]


def sanitize(tool: str) -> dict[str, Any]:
    wrapper = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    return run_tests("gpu", wrapper, SANITIZED, seconds=SANITIZER_SECONDS)


def conclude(document: dict[str, Any]) -> None:
    """Raises where the check did not pass: what failed before what was slow, and that before what is unknown."""
    runs = {"tests": document["tests"], **document["sanitizers"]}
    for name, part in (("TensorRT-RTX", document["tensorrt_rtx"]), ("TensorRT", document["tensorrt"])):
        if "tests" in part:
            runs[name] = part["tests"]
    failed = [f"{name}: {run['summary']}" for name, run in runs.items() if not passed(run)]
    failed += document["failures"]
    if failed:
        raise SkerryError("check GPU", document["subject"]["device"]["name"], "; ".join(failed))
    for state, error in ((MISSED, GateFailed), (UNKNOWN, Inconclusive)):
        named = [target["measure"] for target in document["targets"] if target["state"] == state]
        if named:
            raise error("check GPU", document["subject"]["device"]["name"], f"{state}: {'; '.join(named)}")


def table(document: dict[str, Any]) -> str:
    lines = []
    for one in document["targets"]:
        sign = ">=" if one["better"] == "higher" else "<="
        value = "-" if one["found"] is None else f"{one['found']:.4g}"
        spread = "" if one["low"] is None else f" ({one['low']:.4g} to {one['high']:.4g})"
        why = f", {one['why']}" if one["why"] else ""
        must = f"must {sign} {one['must']:g}: {one['state']}{why}"
        lines.append(f"{one['measure']}: {value} {one['unit']}{spread}, {must}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
