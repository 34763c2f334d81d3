"""From a model's name and a file of weights to a module that is ready to be traced."""

import copy
import hashlib
import inspect
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocomp.errors import ModelError
from autocomp.factory import call_factory, is_factory
from autocomp.memory import refuse_larger
from autocomp.models.outputs import OutputKey, logits_in
from autocomp.models.zoo import ZOO, build_zoo
from autocomp.rows import Inputs, parts_of

__all__ = ["LoadedModel", "called", "check_logits", "first_not_finite", "load_model", "wrap_model"]

EMBEDDED_MODEL, EMBEDDED_CLASSES, EMBEDDED_FILE = "zoo:resnet20", 10, "resnet20_digits.safetensors"
HINT = f"write zoo:NAME ({', '.join(ZOO)}), torchvision:NAME, or package.module:factory"
# Keys under which training scripts keep the state dict, and prefixes that wrappers put before its names.
CONTAINERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
COPIES = 8
"""Of a model's parameters that a search holds at once: 256 MB became 1.95 GB (7.6 copies) before the first trial."""


@dataclass(frozen=True)
class LoadedModel:
    """A module with weights.

    Attributes:
        module: in evaluation mode, on the CPU, in float32.
        spec: what the user asked for; ``live:CLASS`` for an object.
        weights: where they come from: a path, ``embedded``, ``factory`` or ``live`` (whatever the user's code
            gave them); None for random ones.
        weights_digest: SHA-256 over names, types, shapes and bytes of parameters and buffers.
        classes: of the data, and so the least number of logits per image; None where not yet known.
    """

    module: nn.Module
    spec: str
    weights: str | None
    weights_digest: str
    classes: int | None


def load_model(
    spec: str, weights: Path | None, classes: int, *, embedded: bool, output_key: str | None = None
) -> LoadedModel:
    """Build a model and give it weights.

    Args:
        spec: ``zoo:NAME``, ``torchvision:NAME`` or ``package.module:factory``, a function without arguments that
            returns an `nn.Module`.
        weights: ``.safetensors``, or a state dict that loads with ``weights_only=True``. None leaves the random
            weights, equal on every call, or those that the factory gave.
        classes: of the data.
        embedded: where ``weights`` is None, use the weights shipped with the package; ``zoo:resnet20`` has some,
            for the digits.

    Raises:
        ModelError: the model is unknown or cannot be built, or the weights are missing, unreadable or do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # random weights are part of a run's keys
        torch.manual_seed(0)
        module = _build(spec, classes)
    origin = None if spec.startswith(("zoo:", "torchvision:")) else "factory"
    if weights is not None:
        _fill(module, read_weights(weights), str(weights))
        origin = str(weights)
    elif embedded:
        if spec != EMBEDDED_MODEL or classes != EMBEDDED_CLASSES:
            raise ModelError(f"no weights are shipped for {spec} with {classes} classes: pass --weights FILE")
        with resources.as_file(resources.files("autocomp") / "assets" / EMBEDDED_FILE) as path:
            _fill(module, read_weights(path), "the shipped weights")
        origin = "embedded"
    return _ready(module, spec, origin, classes, output_key)


def wrap_model(module: nn.Module, classes: int | None = None, output_key: str | None = None) -> LoadedModel:
    """Take a live module with its weights. It is copied: the caller's stays as it is, mode and device included.

    Args:
        output_key: of the logits, where the model returns several things.

    Raises:
        ModelError: it is no module, needs more memory than there is, or cannot be copied.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"the model is a {type(module).__name__}: pass a torch.nn.Module")
    spec = f"live:{type(module).__name__}"
    return _ready(_copied(module, spec), spec, "live", classes, output_key)


def check_logits(model: LoadedModel, input_shape: tuple[int, ...], inputs: Inputs | None = None) -> None:
    """Run two images (c, h, w) = ``input_shape`` of noise through the model; a blank one may be no input to it.

    Args:
        inputs: of a row of that shape, where the data gives several by name.

    Raises:
        ModelError: it wants other inputs, fails on them, or returns something else than one float tensor of finite
            logits (2, outputs), with at least one output per class.
    """
    _refuse_other_inputs(model, inputs or {})
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            outputs = called(model.module, parts_of(images, inputs) if inputs else images)
    except ModelError:
        raise
    except Exception as error:  # the user's code may fail in any way
        shape = "x".join(map(str, input_shape))
        raise ModelError(f"{model.spec} fails on images of {shape} ({_line(error)}): does it fit the data?") from error
    logits = logits_in(outputs, len(images), model.spec)
    if model.classes is not None and logits.shape[1] < model.classes:
        raise ModelError(
            f"{model.spec} returns {logits.shape[1]} logits, but the data has {model.classes} classes: it needs one "
            "for each"
        )
    if not bool(torch.isfinite(logits).all()):
        place = first_not_finite(model.module, parts_of(images, inputs) if inputs else images)
        raise ModelError(f"{model.spec} returns NaN or infinite logits for an image of noise{place}: check its weights")


def called(module: nn.Module, images: Tensor | Mapping[str, Tensor]) -> Any:
    """What a module gives for images, or for several inputs by the names of forward()'s arguments."""
    return module(images) if isinstance(images, Tensor) else module(**images)


def first_not_finite(module: nn.Module, images: Tensor | Mapping[str, Tensor]) -> str:
    """Where NaN or infinity first comes up, as a phrase for an error; empty if in no submodule's output."""
    found: list[str] = []

    def watched(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return look

    leaves = [(name, part) for name, part in module.named_modules() if name and not any(part.children())]
    handles = [part.register_forward_hook(watched(name)) for name, part in leaves]
    try:
        with torch.no_grad():
            called(module, images)
    finally:
        for handle in handles:
            handle.remove()
    return f", first behind {found[0]}" if found else ""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict; containers and prefixes that training scripts add are taken off.

    Raises:
        ModelError: the file is missing, unreadable, or holds more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}: check --weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is no readable safetensors file ({_line(error)}): save it again") from error
    advice = "save model.state_dict() with torch.save, or a .safetensors file"
    try:
        with warnings.catch_warnings(action="ignore"):  # the error below says it better
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path} holds more than tensors, such as a pickled module: {advice}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ModelError(f"{path} is no file of weights ({_line(error)}): {advice}") from error
    for key in CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path} holds no state dict: {advice}")
    state = {str(name): value for name, value in found.items()}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _build(spec: str, classes: int) -> nn.Module:
    kind, _, name = spec.partition(":")
    if kind == "zoo":
        if name not in ZOO:
            raise ModelError(f"the zoo has no {name!r}: it has {', '.join(ZOO)}")
        return build_zoo(name, classes)
    if kind == "torchvision":
        return _build_torchvision(name, classes)
    if not is_factory(spec):
        raise ModelError(f"unknown model {spec!r}: {HINT}")
    module = call_factory(spec, ModelError, HINT)
    if not isinstance(module, nn.Module):
        raise ModelError(f"{spec}() returns a {type(module).__name__}: it must return a torch.nn.Module")
    return _copied(module, spec)  # the user's code may go on using it


def _build_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models  # slow to import

    known = models.list_models(module=models)
    if name not in known:
        stem = name.rstrip("0123456789_")[:4]
        near = [other for other in known if other.startswith(stem)] or known
        raise ModelError(f"torchvision has no {name!r}: it has {', '.join(near[:8])}{', ...' if len(near) > 8 else ''}")
    module: nn.Module = models.get_model(name, weights=None, num_classes=classes)
    return module


def _fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state``; counters of batches, which evaluation never reads, may be missing."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in wanted]
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    findings = [
        f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unknown", unexpected), ("of another shape", reshaped))
        if names
    ]
    if findings:
        raise ModelError(f"{source} does not fit the model: {'; '.join(findings)}")
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ModelError(f"{source} holds NaN or infinite values in {', '.join(broken[:5])}: save sound weights")
    module.load_state_dict(state, strict=False)


def _copied(module: nn.Module, spec: str) -> nn.Module:
    parameters = sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))
    refuse_larger(spec, {f"for {COPIES} copies of its parameters": COPIES * parameters})
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError, pickle.PickleError) as error:
        raise ModelError(f"the model cannot be copied ({_line(error)}): pass one that copy.deepcopy takes") from error


def _ready(
    module: nn.Module, spec: str, weights: str | None, classes: int | None, output_key: str | None
) -> LoadedModel:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_meta:
            raise ModelError(f"{name} of {spec} is on the meta device, without values: load weights on the CPU first")
    module = module.cpu().float().eval()
    if output_key is not None:
        module.register_forward_hook(OutputKey(output_key))
    return LoadedModel(module, spec, weights, _digest(module), classes)


def _refuse_other_inputs(model: LoadedModel, inputs: Inputs) -> None:
    """Refuse data that does not give what forward() takes."""
    taken = inspect.signature(model.module.forward).parameters
    named = {
        name: entry for name, entry in taken.items() if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)
    }
    wanted = [name for name, entry in named.items() if entry.default is entry.empty]
    takes = f"forward() of {model.spec} takes {', '.join(wanted)}"
    if not inputs and len(wanted) > 1:
        example = ", ".join(f"{name!r}: ..." for name in wanted)
        raise ModelError(
            f"{takes}, but the data yields images alone: let it yield ({{{example}}}, label), or wrap the model in "
            f"a module whose forward({wanted[0]}) computes the others"
        )
    passed_on = any(entry.kind is entry.VAR_KEYWORD for entry in taken.values())
    if inputs and not (set(wanted) <= set(inputs) and (passed_on or set(inputs) <= set(named))):
        raise ModelError(f"{takes}, but the data yields {', '.join(inputs)}: give them forward()'s names")


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):  # modules may keep other state beside tensors
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
