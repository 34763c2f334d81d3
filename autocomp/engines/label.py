"""Which policy a file is of, written into the file itself."""

import json

import onnx as onnx_package

from autocomp.engines.template import parse
from autocomp.errors import EngineError, InputError
from autocomp.policy import Policy

__all__ = ["labelled", "policy_of"]

KEY = "autocomp.policy"


def labelled(onnx: bytes, policy: Policy) -> bytes:
    """The same model with its policy among the metadata. What lies behind a serialized message is merged into it."""
    label = onnx_package.ModelProto()
    label.metadata_props.add(key=KEY, value=json.dumps(policy.to_json(), sort_keys=True))
    return onnx + bytes(label.SerializeToString())


def policy_of(onnx: bytes) -> Policy:
    """Raises: EngineError: the file is no model, or carries no policy."""
    found = next((entry.value for entry in parse(onnx).metadata_props if entry.key == KEY), None)
    if found is None:
        raise EngineError("this file does not say which policy of which model it is: only files of autocomp do")
    try:
        return Policy.from_json(json.loads(found))
    except (ValueError, InputError) as error:
        raise EngineError(f"the policy that this file carries cannot be read ({error}): write it again") from error
