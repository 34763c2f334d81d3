"""A kernel as a user asks for it: some fields given, the rest as the profile's kernels have them."""

from collections import Counter
from dataclasses import dataclass

from autocomp.errors import ConfigError
from autocomp.hardware.kernels import Kernel
from autocomp.hardware.profile import HardwareProfile

__all__ = ["Question", "kernel_asked"]


@dataclass(frozen=True, slots=True)
class Question:
    """What a user knows of a kernel.

    Attributes:
        op: ``conv``, ``linear`` or ``entry``.
        channels_in, channels_out: of the whole layer, all groups together.
        kernel, stride, size: as ``3`` or ``3x5``; the size is the output's. Empty where the operator has none.
        groups: of a conv.
        batch: images a run.
        precision: ``fp32``, ``int8``, ...
        context: all or a part of a measured kernel's; None for the one that was measured most often.
    """

    op: str
    channels_in: int
    channels_out: int
    kernel: str = ""
    stride: str = ""
    groups: int = 1
    size: str = ""
    batch: int = 1
    precision: str = "fp32"
    context: str | None = None


def kernel_asked(profile: HardwareProfile, question: Question) -> Kernel:
    """The kernel that a question is about, in a context that was measured for its operator and precision.

    Raises:
        ConfigError: nothing of that operator, precision or context was measured, or a number is wrong.
    """
    alike = [e for e in profile.kernels if (e.kernel.op, e.kernel.precision) == (question.op, question.precision)]
    if not alike:
        kinds = sorted({f"{entry.kernel.op} in {entry.kernel.precision}" for entry in profile.kernels})
        raise ConfigError(
            f"the profile {profile.device} has no {question.op} in {question.precision}: it has "
            f"{', '.join(kinds) or 'no measured kernels, build it with autocomp profile build'}"
        )
    samples = Counter[str]()
    for entry in alike:
        samples[entry.kernel.context] += entry.samples
    # Most samples first, equal ones by name: the same question always has the same answer.
    contexts = sorted(samples, key=lambda context: (-samples[context], context))
    wanted = question.context
    if wanted is not None and wanted not in samples:
        contexts = [context for context in contexts if wanted in context]
        if not contexts:
            most = max(samples, key=samples.__getitem__)
            raise ConfigError(
                f"no {question.op} in {question.precision} was measured in a context with {wanted!r}: "
                f"there are {len(samples)}, most often {most!r}"
            )
    context = contexts[0] if wanted is None or wanted not in samples else wanted
    example = next(entry.kernel for entry in alike if entry.kernel.context == context)
    if question.op == "conv" and not (question.kernel and question.size):
        raise ConfigError("a conv needs its kernel and the size of its output: give --kernel and --size")
    if min(question.groups, question.channels_in, question.channels_out) < 1:
        raise ConfigError("channels and groups must be 1 or more")
    if question.channels_in % question.groups or question.channels_out % question.groups:
        raise ConfigError(f"{question.groups} groups do not divide the channels: give --groups that divides both")
    stride = question.stride or "1" * (question.op == "conv")
    return Kernel(
        question.op,
        question.channels_in,
        question.channels_out,
        _sizes("kernel", question.kernel, len(example.kernel)),
        _sizes("stride", stride, len(example.stride)),
        question.groups,
        _sizes("size", question.size, len(example.size)),
        question.batch,
        question.precision,
        context,
    )


def _sizes(name: str, text: str, rank: int) -> tuple[int, ...]:
    """``3`` once for each axis, ``3x5`` as it is; rank 0 where measured kernels have none."""
    try:
        sizes = tuple(map(int, text.split("x"))) if text else ()
    except ValueError:
        raise ConfigError(f"--{name} {text}: write 3 or 3x3") from None
    if len(sizes) == 1:
        sizes *= max(rank, 1)
    if rank and sizes and len(sizes) != rank:
        raise ConfigError(f"--{name} {text}: the measured kernels have {rank} axes, give as many")
    return sizes
