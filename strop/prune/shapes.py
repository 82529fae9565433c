"""What views, slices, joins and pooling say about channels: which dimensions they hand on, split or fix."""

from strop.prune.axes import Dim, freeze, fresh, regroup, size
from strop.prune.calls import Call, Dims, broadcast, fixed_dim, frozen


def viewed(call: Call) -> Dims:
    """Reshapes: dimensions are split and merged."""
    value = call.values()[0]
    dims = regroup([atom for dim in value.dims for atom in dim], call.shape)
    return frozen(call) if dims is None else tuple(dims)


def transposed(call: Call) -> Dims:
    """Two dimensions change places."""
    value = call.values()[0]
    dims = [*value.dims]
    if len(dims) > 1:
        one, other = call.args.get("dim0", 0), call.args.get("dim1", 1)
        dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


def permuted(call: Call) -> Dims:
    """Dimensions in another order."""
    return tuple(call["self"].dims[index] for index in call["dims"])


def expanded(call: Call) -> Dims:
    """What is repeated by a stride of zero is new."""
    dims = call["self"].dims
    dims = ((),) * (len(call.shape) - len(dims)) + dims
    return tuple(dim or fresh(length) for dim, length in zip(dims, call.shape, strict=True))


def repeated(call: Call) -> Dims:
    """Tiles: the copies are the outer factor."""
    dims = call["self"].dims
    dims = ((),) * (len(call.shape) - len(dims)) + dims
    return tuple((*fresh(times), *dim) for times, dim in zip(call["repeats"], dims, strict=True))


def selected(call: Call) -> Dims:
    """One entry of a dimension, whose place means something."""
    value = call["self"]
    freeze(value.dims[call["dim"]], call.reason)
    index = call["dim"] % len(value.dims)
    return value.dims[:index] + value.dims[index + 1 :]


def sliced(call: Call) -> Dims:
    """A slice that is one of several equal parts holds the inner factor; another fixes the dimension."""
    value = call["self"]
    index = call["dim"] % len(value.dims)
    dim, length = value.dims[index], call.shape[index]
    whole = size(dim)
    if length != whole:
        start = (call["start"] or 0) % whole
        even = call["step"] == 1 and whole % length == 0 and start % length == 0
        dim = part(call, dim, length) if even else fixed_dim(call, dim, length)
    return (*value.dims[:index], dim, *value.dims[index + 1 :])


def divided(call: Call) -> Dims:
    """One of the parts of a split, which are alike where they are of one size and else fix the dimension."""
    value = call["self"]
    index = call["dim"] % len(value.dims)
    sizes = call.args.get("split_sizes") or [1]
    dim, length = value.dims[index], call.shape[index]
    if length != size(dim):
        even = size(dim) % length == 0 and len({*sizes}) == 1
        dim = part(call, dim, length) if even else fixed_dim(call, dim, length)
    return (*value.dims[:index], dim, *value.dims[index + 1 :])


def part(call: Call, dim: Dim, length: int) -> Dim:
    """One of equal parts of a dimension: which of them is fixed, the channels within it are not."""
    dims = regroup(dim, (size(dim) // length, length))
    if dims is None:
        return fixed_dim(call, dim, length)
    freeze(dims[0], call.reason)
    return dims[1]


def joined(call: Call) -> Dims:
    """Concatenation: places along the dimension mean something, the others are the same channels."""
    values = [value for value in call["tensors"] if size(sum(value.dims, ())) and value.dims]
    along = call["dim"] % len(values[0].dims)
    dims = values[0].dims
    for value in values:
        freeze(value.dims[along], call.reason)
        rest = tuple(() if index == along else dim for index, dim in enumerate(value.dims))
        broadcast(dims, rest)
    return (*dims[:along], fixed_dim(call, (), call.shape[along]), *dims[along + 1 :])


def stacked(call: Call) -> Dims:
    """A new dimension of places, the others joined."""
    dims: Dims = ()
    for value in call["tensors"]:
        dims = broadcast(dims, value.dims)
    along = call["dim"] % (len(dims) + 1)
    return (*dims[:along], fixed_dim(call, (), call.shape[along]), *dims[along:])


def pooled(call: Call) -> Dims:
    """Pooling, padding and resizing: the last dimensions are places and new ones, unless the window is 1."""
    value = call.values()[0]
    count = next((int(mark) for mark in call.name if mark in "123"), 0) or len(call["pad"]) // 2
    windows = call.args.get("kernel_size") or [0] * count
    places = zip(value.dims[-count:], call.shape[-count:], windows, strict=True)
    return value.dims[:-count] + tuple(
        dim if window == 1 and length == size(dim) else fixed_dim(call, dim, length)
        for dim, length, window in places
    )


def created(call: Call) -> Dims:
    """New tensors of one value."""
    return tuple(fresh(length) for length in call.shape)
