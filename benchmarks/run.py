"""Run every benchmark, each in a fresh process; write results.json and the table in README.md.

    python benchmarks/run.py [--threads 1] [one_pass opnp_sweep ...]

Names limit the run; the others keep their last result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from oodlib.files import write_json, write_text

HERE = Path(__file__).resolve().parent
NAMES = (
    "gradnorm_closed_form",
    "grood_search",
    "layer_gradients",
    "one_pass",
    "opnp_sweep",
    "streaming_covariance",
)
START, END = "<!-- results: written by run.py -->\n", "<!-- end of results -->"


def measure(name: str, threads: int) -> dict[str, Any]:
    """Run one script; its output ends with a JSON object that starts on a line of its own."""
    limits = {
        key: str(threads) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py")],
        env={**os.environ, **limits},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    result = json.loads(
        "{\n" + done.stdout.rpartition("\n{\n")[2] if "\n{\n" in done.stdout else done.stdout
    )
    return {
        **result,
        "threads": threads,
        "machine": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 1),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The measured values beside their targets, as markdown."""
    lines = ["| what | measured | target |", "|---|---|---|"]
    if r := results.get("gradnorm_closed_form"):
        lines += [
            f"| GradNorm, {r['n']:,} x 2048 x 1000: closed form against the per-sample loop | "
            f"{r['official loop']['ratio']:.0f}x faster | at least 50x |",
            "| the same against pytorch-ood's vmap, last layer only | "
            f"{r['pytorch-ood vmap']['ratio']:.0f}x faster | at least 10x |",
        ]
    if r := results.get("grood_search"):
        flat = r["index"]["flat"]
        lines += [
            f"| GROOD's gradients, {r['samples']:,} x 512, 10 classes: closed form against "
            f"per-sample autograd | {r['ratio']:.0f}x faster | at least 5x |",
            f"| nearest gradient among {r['bank']:,} x 512, exact | {flat['batched_ms']:.2f} ms a "
            f"query in batches, {flat['single_ms']:.1f} ms one at a time | |",
        ]
        lines += [
            f"| the same, {name}{' as in the released code' if '56' in name else ''} | "
            f"{row['batched_ms']:.2f} ms, {row['single_ms']:.1f} ms; recall@1 {row['recall']:.0%} "
            "| |"
            for name, row in r["index"].items()
            if name != "flat"
        ]
    if r := results.get("layer_gradients"):
        lines += [
            f"| gradient norm of every tensor and image, Glow {name} | {m['ratio']['loop']:.1f}x "
            f"faster than one image at a time, {m['ratio']['vmap']:.1f}x than vmap(grad) | at "
            "least 3x on 2 threads |"
            for name, m in r["models"].items()
        ]
    if r := results.get("one_pass"):
        lines += [
            f"| `extract` and {len(r['parts_min_s']) - 1} detectors, ResNet-20, {r['n']:,} images, "
            f"against the bare forward pass | {r['cpu_ratio_of_medians']:.2f}x the CPU time, "
            f"{r['ratio_of_medians']:.2f}x the wall time (medians of {r['repeats']}) | at most "
            "1.15x |"
        ]
    if r := results.get("opnp_sweep"):
        lines += [
            f"| OPNP's sweep, {r['points']} pairs of ratios, {r['n']:,} x 2048 x 1000 | "
            f"{r['seconds']:.0f} s, {r['ratio']:.0f}x faster than pair by pair | at most 60 s on 2 "
            "cores |"
        ]
    if r := results.get("streaming_covariance"):
        lines += [
            f"| streamed covariance of {r['n']:,} x {r['dimension']}, {r['classes']:,} classes | "
            f"{r['peak_gib']:.2f} GiB peak, {r['seconds']:.0f} s | at most 1.5 GiB |"
        ]
    lines += [
        "",
        *(
            f"- `{name}`: {r['machine']}, {r['threads']} thread(s), load of the machine before the "
            f"run {r['load_before']}"
            for name, r in results.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(NAMES))
    parser.add_argument(
        "--threads", type=int, default=1, help="of every process; one makes ratios comparable"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    file, readme = HERE / "results.json", HERE / "README.md"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in options.names or NAMES:
        results[name] = measure(name, options.threads)
        write_json(file, results)
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    write_text(readme, before + START + table(results) + END + rest.partition(END)[2])
    print(table(results))


if __name__ == "__main__":
    main()
