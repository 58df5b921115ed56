"""Regions for the argument ``regions`` of the losses: the lesions of a label map, and what lies nearest to each.

They are computed on the host, by SciPy (and cc3d where it is installed), and belong into data loading, where workers
have time for them. See docs/every_lesion.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _options

__all__ = ["AddRegionsd", "Regions", "components", "voronoi"]


class Regions(NamedTuple):
    """Each voxel's region, of the label map's kind (an array or a tensor), and how many regions there are.

    They are uint8, int16 or int32: the smaller, the less the passes have to read.
    """

    regions: Any
    num_regions: int


def components(
    label: Any,
    *,
    connectivity: int | None = None,
    per_class: bool = False,
    classes: int | None = None,
    ignore_index: int | None = None,
    batch: bool = False,
) -> Regions:
    """The connected components of a label map's foreground: 1, 2, ... in the order of their first voxels, 0 elsewhere.

    Voxels are connected where they touch and have the same label.

    Args:
        label: Class indices (*spatial), an array or a CPU tensor of bool or integers; what is > 0 is foreground.
        connectivity: 1: voxels touch by their faces; up to the number of dimensions (None): also by edges and corners.
        per_class: True gives (C, *spatial), one partition for each class, those of channel c of the voxels with label
            c (of the background one region, 0).
        classes: C, for ``per_class``; None: the largest label plus one.
        ignore_index: Voxels with this label are no foreground. Their region is -1.
        batch: True: label is (N, *spatial), or (N, 1, *spatial) with per_class=False, each sample by itself.

    Returns:
        Regions(regions, num_regions): the largest number of components of a sample (and class) plus one.

    Raises:
        TypeError: label is no array or CPU tensor of bool or integers.
        ValueError: connectivity, or a negative label that is not ignore_index.

    Examples:
        >>> regions, num_regions = tk.regions.components(label)
    """
    return _each(label, batch, _Partition(connectivity, per_class, classes, ignore_index, None, False))


def voronoi(
    label: Any,
    *,
    connectivity: int | None = None,
    spacing: tuple[float, ...] | None = None,
    per_class: bool = False,
    classes: int | None = None,
    ignore_index: int | None = None,
    batch: bool = False,
) -> Regions:
    """Every voxel to its nearest component of the foreground: 0, 1, ... in the order of `components`.

    That is the partition of CC-Metrics (Jaus et al. 2024, arXiv:2410.18684): one region, 0, where there is no
    foreground. A voxel that is equally near to several components belongs to one of them.

    Args:
        label: As in `components`, as for all that is not named here.
        spacing: A voxel's size along each dimension; None: 1 along all.

    Returns:
        Regions(regions, num_regions): the largest number of components of a sample (and class), or 1.

    Examples:
        >>> regions, num_regions = tk.regions.voronoi(label)
        >>> loss = tk.tversky_loss(logits, label[None], regions=regions[None], num_regions=num_regions)
    """
    return _each(label, batch, _Partition(connectivity, per_class, classes, ignore_index, spacing, True))


class AddRegionsd:
    """A transform of dictionaries, as MONAI's `Compose` takes them: adds the regions of a label map.

    Args:
        key: Of the label map, (1, *spatial) or (*spatial).
        regions_key: Of the regions that are added, of the label map's spatial shape (*spatial).
        number_key: Of their number.
        kind: "voronoi" or "components".
        **options: Of `voronoi` or `components`, but for batch.

    Where a batch is on a GPU, its largest number of regions is known on the host before: ``num_regions =
    int(batch["num_regions"].max())`` of the collated CPU tensor.

    Examples:
        >>> transforms = Compose([LoadImaged(("image", "label")), tk.regions.AddRegionsd("label")])
    """

    def __init__(
        self,
        key: str,
        regions_key: str = "regions",
        number_key: str = "num_regions",
        kind: str = "voronoi",
        **options: Any,
    ):
        self.key, self.regions_key, self.number_key = key, regions_key, number_key
        self._function = {"voronoi": voronoi, "components": components}[
            _options.one_of("kind", kind, ("voronoi", "components"))
        ]
        self._kind, self._given = kind, options
        if "batch" in options:
            raise TypeError("AddRegionsd: unexpected argument 'batch'; a transform has one sample")

    def __call__(self, data: dict) -> dict:
        """The dictionary, with the regions."""
        label = data[self.key]
        if isinstance(label, torch.Tensor):
            label = label.as_subclass(torch.Tensor)  # without the metadata that MONAI's tensors carry
        if label.ndim > 1 and label.shape[0] == 1:
            label = label[0]
        if label.dtype in (torch.float32, torch.float64) or getattr(label.dtype, "kind", "") == "f":
            label = label.astype("int64") if hasattr(label, "astype") else label.long()  # as MONAI loads them
        regions, number = self._function(label, **self._given)
        return {**data, self.regions_key: regions, self.number_key: number}

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self._given.items())
        return f"AddRegionsd({self.key!r}, kind={self._kind!r}{options})"


class _Partition(NamedTuple):
    connectivity: int | None
    per_class: bool
    classes: int | None
    ignore_index: int | None
    spacing: tuple[float, ...] | None
    nearest: bool

    def of(self, label):
        """The regions of one sample, and how many they are."""
        import numpy as np

        if not self.per_class:
            return self._of_foreground(label, np.where(self._ignored(label), 0, label))
        classes = self.classes if self.classes is not None else int(label.max(initial=0)) + 1
        background = np.zeros(label.shape, np.int32)
        background[self._ignored(label)] = -1
        found = [(background, 1)]
        found += [self._of_foreground(label, label == c) for c in range(1, classes)]
        return np.stack([x for x, _ in found[:classes]]), max(n for _, n in found[:classes])

    def _ignored(self, label):
        return False if self.ignore_index is None else label == self.ignore_index

    def _of_foreground(self, label, foreground):
        import numpy as np

        ids, count = _connected(foreground, self.connectivity)
        if not self.nearest:
            count += 1
        elif count > 0:
            ids, count = _nearest(ids, self.spacing) - 1, max(count, 1)
        else:
            count = 1
        return np.where(self._ignored(label), np.int32(-1), ids), count


def _each(label, batch: bool, partition: _Partition) -> Regions:
    import numpy as np

    array, is_tensor = _array_of(label)
    _options.flag("batch", batch)
    _options.flag("per_class", partition.per_class)
    dimensions = array.ndim - batch
    if dimensions < 1:
        raise ValueError(f"label: expected {'(N, *spatial)' if batch else '(*spatial)'}, got the shape {array.shape}")
    given = partition.connectivity
    if given is not None and (isinstance(given, bool) or given not in range(1, dimensions + 1)):
        raise ValueError(f"connectivity: expected 1 to {dimensions}, or None, got {given!r}")
    if partition.spacing is not None:
        spacing = tuple(_options.number(f"spacing[{i}]", x, positive=True) for i, x in enumerate(partition.spacing))
        if len(spacing) != dimensions:
            raise ValueError(f"spacing: expected {dimensions} numbers, got {len(spacing)}")
        partition = partition._replace(spacing=spacing)
    if array.size and array.dtype != bool:
        negative = array[array < 0]
        negative = negative[negative != partition.ignore_index] if partition.ignore_index is not None else negative
        if negative.size:
            raise ValueError(f"label: expected labels >= 0 or the ignore_index, got {negative[0]}")
    samples = array if batch else array[None]
    if partition.per_class and partition.classes is None and array.size:
        partition = partition._replace(classes=int(array.max()) + 1)
    found = [partition.of(sample) for sample in samples]
    channels = (partition.classes or 1,) if partition.per_class else ()
    regions = np.stack([x for x, _ in found]) if found else np.zeros((0, *channels, *array.shape[1:]), np.int32)
    number = max([n for _, n in found], default=1)
    dtype = np.uint8 if number <= 256 and partition.ignore_index is None else np.int16 if number <= 2**15 else np.int32
    regions = np.ascontiguousarray(regions if batch else regions[0], dtype)
    return Regions(torch.from_numpy(regions) if is_tensor else regions, number)


def _array_of(label):
    import numpy as np

    is_tensor = isinstance(label, torch.Tensor)
    if is_tensor and not label.is_cpu:
        raise TypeError(f"label: expected an array or a CPU tensor, got a tensor on {label.device}")
    array = label.detach().numpy() if is_tensor else label
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "bui":
        kind = array.dtype if isinstance(array, np.ndarray) else type(label).__name__
        raise TypeError(f"label: expected an array or a CPU tensor of bool or integers, got {kind}")
    return array, is_tensor


def _connected(foreground, connectivity: int | None):
    # Components (1, 2, ... in the order of their first voxels) of voxels with the same label, and how many they are.
    import numpy as np

    dimensions = foreground.ndim
    connectivity = dimensions if connectivity is None else connectivity
    if foreground.size == 0:
        return np.zeros(foreground.shape, np.int32), 0
    by_cc3d: Any = {(2, 1): 4, (2, 2): 8, (3, 1): 6, (3, 2): 18, (3, 3): 26}.get((dimensions, connectivity))
    if by_cc3d is not None:
        try:
            import cc3d
        except ImportError:
            pass
        else:
            label = foreground.view(np.uint8) if foreground.dtype == bool else foreground
            ids, count = cc3d.connected_components(np.ascontiguousarray(label), connectivity=by_cc3d, return_N=True)
            return _in_order(ids, count), count
    from scipy import ndimage

    touching = ndimage.generate_binary_structure(dimensions, connectivity)
    values = [True] if foreground.dtype == bool else np.unique(foreground[foreground > 0])
    ids, count = np.zeros(foreground.shape, np.int32), 0
    for value in values:
        of_value, found = ndimage.label(foreground == value, touching)
        ids = np.where(of_value > 0, of_value + count, ids)
        count += found
    return _in_order(ids, count), count


def _in_order(ids, count: int):
    # Renumbered by the first voxel of each.
    import numpy as np

    flat = ids.reshape(-1)
    at = np.flatnonzero(flat)[::-1]
    first = np.full(count + 1, -1)
    first[flat[at]] = at  # of equals the last is kept, which is the first voxel
    if (np.diff(first) > 0).all():
        return ids
    new = np.zeros(count + 1, np.int32)
    new[np.argsort(first)] = np.arange(count + 1, dtype=np.int32)
    return new[ids]


def _nearest(ids, spacing: tuple[float, ...] | None):
    # The component of the nearest voxel that is in any.
    from scipy import ndimage

    at = ndimage.distance_transform_edt(ids == 0, spacing, return_distances=False, return_indices=True)
    return ids[tuple(at)]
