"""What the guided controller finds in 30 evaluations, measured: ResNet-20 at 0.5x, ResNet-56 at 0.5x and 0.4x.

    AUTOCOMP_SHARED=... python -m benchmarks.verified [--case resnet20:0.5x|resnet56:0.5x|resnet56:0.4x ...]

CIFAR-10, batch 32, one thread, no training; accuracies are of the engine over all 10,000 test images, latencies of real
engines on this machine, whose profile is in place. Writes ``benchmarks/results/verified.json``.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import cifar10, save, shared
from benchmarks.main_job import describe, search

CASES = ("resnet20:0.5x", "resnet56:0.5x", "resnet56:0.4x")
EVALUATIONS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--work", type=Path, help="folder for CIFAR-10; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = cifar10(args.work or Path(temporary))
        for case in args.case or CASES:
            model, budget = case.split(":")
            weights = shared() / "weights" / f"cifar10_{model}.safetensors"
            arguments = ["--model", f"zoo:{model}", "--weights", str(weights), "--data", f"npz:{data}"]
            arguments += ["--budget", budget, "--batch", "32", "--controller", "guided"]
            arguments += ["--trials", str(EVALUATIONS), "--baseline-trials", "0"]
            found = search(arguments, Path(temporary) / case.replace(":", "-"))
            describe(f"{model}, --budget {budget}, {EVALUATIONS} trials", found)
            print(f"written: {save('verified', {case: found})}")


if __name__ == "__main__":
    main()
