"""Hand-made graphs whose numbers can be worked out on paper."""

from autocomp.graph import Branch, Group, Layer, LayerGraph, Member, Node


def each(channels: int, start: int = 0) -> tuple[tuple[int, ...], ...]:
    """Positions of channels that occupy one index each."""
    return tuple((start + channel,) for channel in range(channels))


def conv(name: str, node: str, out: int, read: int, positions: int) -> Layer:
    return Layer(name, "conv", node, (out, read, 3, 3), positions, (1, 1), (1, 1), (1, 1), normalised=True)


def parameters_of(layers: tuple[Layer, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {layer.weight: layer.weight_shape for layer in layers}
    return {**shapes, **{layer.bias: layer.weight_shape[:1] for layer in layers}}


def inner_group(writer: Layer, reader: Layer) -> Group:
    channels = writer.weight_shape[0]
    members = (
        Member(writer.weight, 0, each(channels)),
        Member(writer.bias, 0, each(channels)),
        Member(reader.weight, 1, each(channels)),
    )
    return Group(writer.name, channels, members)


def residual_net(blocks: int, channels: int = 16, size: int = 4) -> LayerGraph:
    """Stem, ``blocks`` blocks of two 3x3 convolutions around an addition, mean pooling, a linear head of 10.

    Values: ``conv_stem``, ``relu_stem``; per block k ``conv_{k}a``, ``relu_{k}a``, ``conv_{k}b``, ``add_{k}``,
    ``relu_{k}``; ``mean``, ``flatten``, ``linear``.
    """
    shape, positions = (channels, size, size), size * size
    nodes = [
        Node("x", "input", (), (3, size, size)),
        Node("conv_stem", "conv2d", ("x",), shape),
        Node("relu_stem", "relu", ("conv_stem",), shape),
    ]
    layers = [conv("stem", "conv_stem", channels, 3, positions)]
    groups, branches, stream = [], [], "relu_stem"
    for k in range(blocks):
        a = conv(f"blocks.{k}.a", f"conv_{k}a", channels, channels, positions)
        b = conv(f"blocks.{k}.b", f"conv_{k}b", channels, channels, positions)
        nodes += [
            Node(f"conv_{k}a", "conv2d", (stream,), shape),
            Node(f"relu_{k}a", "relu", (f"conv_{k}a",), shape),
            Node(f"conv_{k}b", "conv2d", (f"relu_{k}a",), shape),
            Node(f"add_{k}", "add", (stream, f"conv_{k}b"), shape),
            Node(f"relu_{k}", "relu", (f"add_{k}",), shape),
        ]
        layers += [a, b]
        groups.append(inner_group(a, b))
        branches.append(Branch(f"blocks.{k}", f"add_{k}", stream, f"conv_{k}b", (a.name, b.name)))
        stream = f"relu_{k}"
    nodes += [
        Node("mean", "mean", (stream,), (channels, 1, 1)),
        Node("flatten", "flatten", ("mean",), (channels,)),
        Node("linear", "linear", ("flatten",), (10,)),
    ]
    layers.append(Layer("head", "linear", "linear", (10, channels), 1))
    return LayerGraph(
        tuple(nodes), "linear", tuple(layers), tuple(groups), tuple(branches), parameters_of(tuple(layers))
    )


def concat_net() -> LayerGraph:
    """Two convolutions side by side, concatenated, pooled, flattened into a linear head of 5.

    ``left`` writes 4 channels and ``right`` 6 of the concatenation's 10; each channel is then 2 x 2 positions wide,
    so the head reads 40 features. ``right`` is followed by a depthwise convolution.
    """
    left = Layer("left", "conv", "conv_left", (4, 3, 1, 1), 16, (1, 1), (0, 0), (1, 1))
    right = Layer("right", "conv", "conv_right", (6, 3, 3, 3), 16, (1, 1), (1, 1), (1, 1))
    depth = Layer("depth", "conv", "conv_depth", (6, 1, 3, 3), 16, (1, 1), (1, 1), (1, 1), groups=6)
    head = Layer("head", "linear", "linear", (5, 40), 1)
    nodes = (
        Node("x", "input", (), (3, 4, 4)),
        Node("conv_left", "conv2d", ("x",), (4, 4, 4)),
        Node("relu_left", "relu", ("conv_left",), (4, 4, 4)),
        Node("conv_right", "conv2d", ("x",), (6, 4, 4)),
        Node("conv_depth", "conv2d", ("conv_right",), (6, 4, 4)),
        Node("relu_depth", "relu", ("conv_depth",), (6, 4, 4)),
        Node("cat", "cat", ("relu_left", "relu_depth"), (10, 4, 4)),
        Node("pool", "max_pool2d", ("cat",), (10, 2, 2)),
        Node("view", "view", ("pool",), (40,)),
        Node("linear", "linear", ("view",), (5,)),
    )

    def flattened(start: int, channels: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(4 * (start + c), 4 * (start + c + 1))) for c in range(channels))

    groups = (
        Group(
            "left",
            4,
            (
                Member("left.weight", 0, each(4)),
                Member("left.bias", 0, each(4)),
                Member("head.weight", 1, flattened(0, 4)),
            ),
        ),
        Group(
            "right",
            6,
            (
                Member("right.weight", 0, each(6)),
                Member("right.bias", 0, each(6)),
                Member("depth.weight", 0, each(6)),
                Member("depth.bias", 0, each(6)),
                Member("head.weight", 1, flattened(4, 6)),
            ),
        ),
    )
    layers = (left, right, depth, head)
    return LayerGraph(nodes, "linear", layers, groups, (), parameters_of(layers))
