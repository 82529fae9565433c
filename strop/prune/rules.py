"""What each tensor operation says about channels: which dimensions it joins, hands on, splits or fixes.

A rule gets a `Call` whose tensors are `Value`s and returns the dimensions of the result. What has no rule is
frozen by the tracer. Frozen as well is what would not be the same after a cut as after zeroing: normalised,
averaged and indexed dimensions.
"""

from strop.prune import shapes
from strop.prune.axes import Dim, freeze, fresh, leaves, regroup, root, size, unify
from strop.prune.calls import Call, Dims, Kind, Rule, Value, broadcast, frozen, indices

WINDOW = "it is the window of a convolution"
"""Why the last axes of a convolution's weight are frozen."""


def pointwise(call: Call) -> Dims:
    """Elementwise operations: dimensions are joined position by position, aligned at the right."""
    dims: Dims = ()
    adds = call.name in ("add", "sub", "rsub")
    for value in call.values():
        dims = broadcast(dims, value.dims, adds and value.kind is not Kind.WEIGHT)
    return dims


def product(call: Call) -> Dims:
    """A matrix product, of batches or not, with something added or not."""
    left, right = (call[name] for name in _FACTORS[call.name])
    *batch, rows, inner = left.dims if len(left.dims) > 1 else ((), *left.dims)
    *others, across, columns = right.dims if len(right.dims) > 1 else (*right.dims, ())
    batch = [unify(a, b) if a and b else a or b for a, b in zip(batch, others, strict=True)]
    contract(call, left, inner, rows, right, across, columns)
    dims = tuple(dim for dim, there in ((rows, len(left.dims) > 1), (columns, len(right.dims) > 1)) if there)
    return broadcast((*batch, *dims), call["self"].dims) if "add" in call.name else (*batch, *dims)


_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
}


def contract(call: Call, left: Value, inner: Dim, rows: Dim, right: Value, across: Dim, columns: Dim) -> None:
    """Join what is summed over, and note what a matrix of parameters reads and makes."""
    for reads, weight, takes, gives in ((left, right, across, columns), (right, left, inner, rows)):
        if weight.kind is Kind.WEIGHT and reads.kind is not Kind.WEIGHT:
            note(call, takes, "consumer")
            produce(call, gives, reads)
    unify(inner, across)


def note(call: Call, dim: Dim, role: str) -> None:
    """Give the axis of a parameter a role; one that is read somewhere is a consumer, whatever else it is."""
    for atom in leaves(dim):
        if atom.axis and call.roles.get(atom.axis) != "consumer":
            call.roles[atom.axis] = role


def produce(call: Call, dim: Dim, reads: Value) -> None:
    """Note that a parameter makes these channels out of what it reads."""
    note(call, dim, "producer")
    for atom in leaves(dim):
        root(atom).produced = True
        root(atom).first |= reads.kind is Kind.INPUT


def convolution(call: Call) -> Dims:
    """Channels in and out, in groups that pair up; a depthwise weight is tied to what it reads."""
    x, weight, groups = call["input"], call["weight"], call["groups"]
    spatial = len(call["stride"])
    batch, channels = x.dims[: -spatial - 1], x.dims[-spatial - 1]
    takes, gives = weight.dims[:2] if call["transposed"] else weight.dims[1::-1]
    shared = takes if call["transposed"] else gives  # the axis that holds the groups
    within = regroup(shared, (groups, size(shared) // groups))
    read = regroup(channels, (groups, size(channels) // groups))
    if within is None or read is None:
        return frozen(call)
    for window in weight.dims[2:]:
        freeze(window, WINDOW)
    (parts, rest), (groups_in, each) = within, read
    takes, gives = (rest, gives) if call["transposed"] else (takes, rest)
    if groups == size(channels) > 1:
        freeze(gives, "it is the multiplier of a depthwise convolution")
    if weight.kind is Kind.WEIGHT and x.kind is not Kind.WEIGHT:
        note(call, takes, "consumer")
        produce(call, gives, x)
    unify(each, takes)
    unify(groups_in, parts)
    out = (*parts, *gives)
    if call["bias"] is not None:
        unify(out, call["bias"].dims[0])
    return (*batch, out, *(fresh(length) for length in call.shape[-spatial:]))


def batch_norm(call: Call) -> Dims:
    """Statistics and scales are a number for each channel."""
    x = call["input"]
    for value in call.values()[1:]:
        unify(x.dims[1], value.dims[0])
    return x.dims


def normalised(call: Call) -> Dims:
    """Layer and RMS norms: all that they normalise over stays."""
    x = call["input"]
    for value in call.values()[1:]:
        broadcast(x.dims, value.dims)
    for dim in x.dims[-len(call["normalized_shape"]) :]:
        freeze(dim, call.reason)
    return x.dims


def kept(call: Call) -> Dims:
    """The result has the dimensions of the first tensor."""
    return call.values()[0].dims


def fixed(call: Call) -> Dims:
    """The result has the dimensions of the first tensor, and depends on all of those named by `dim`."""
    value = call.values()[0]
    for index in indices(call, value):
        freeze(value.dims[index], call.reason)
    return value.dims


def summed(call: Call) -> Dims:
    """A sum reads nothing from channels that are zero, so it leaves them free."""
    value = call.values()[0]
    along = indices(call, value)
    if call.args.get("keepdim"):
        return tuple(() if index in along else dim for index, dim in enumerate(value.dims))
    return tuple(dim for index, dim in enumerate(value.dims) if index not in along)


def reduced(call: Call) -> Dims:
    """Means, extremes and variances depend on how many channels there are."""
    fixed(call)
    return summed(call)


def looked_up(call: Call) -> Dims:
    """An embedding makes channels; its rows are chosen by number."""
    weight, index = call["weight"], call["indices"]
    freeze(weight.dims[0], call.reason)
    produce(call, weight.dims[1], index)
    return (*index.dims, weight.dims[1])


_NAMES: dict[Rule, str] = {
    pointwise: "copy _to_copy fill zero zeros_like ones_like full_like empty_like masked_fill where",
    kept: "detach alias lift_fresh lift_fresh_copy contiguous dropout native_dropout",
    product: "mm bmm mv dot addmm addmv baddbmm",
    convolution: "convolution",
    batch_norm: "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm",
    normalised: "native_layer_norm _fused_rms_norm",
    fixed: "_softmax _log_softmax _safe_softmax cumsum flip roll tril triu",
    summed: "sum",
    reduced: "mean amax amin max min argmax argmin var std var_mean prod any all logsumexp "
    "linalg_vector_norm",
    shapes.viewed: "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten",
    shapes.transposed: "t transpose",
    shapes.permuted: "permute",
    shapes.expanded: "expand",
    shapes.repeated: "repeat",
    shapes.selected: "select unbind",
    shapes.sliced: "slice",
    shapes.divided: "split split_with_sizes unsafe_split unsafe_split_with_sizes glu",
    shapes.joined: "cat",
    shapes.stacked: "stack",
    looked_up: "embedding",
    shapes.pooled: "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
    "constant_pad_nd _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d",
    shapes.created: "new_zeros new_ones new_full new_empty",
}
PRODUCTS = frozenset(" ".join((_NAMES[product], _NAMES[convolution], _NAMES[looked_up])).split())
"""Operations that make channels of parameters out of what they read."""
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
"""By name of an operation of aten; those that torch tags as pointwise follow `pointwise`."""
