"""Reads labelled volumes, DICOM CT with an RTSTRUCT contour set or NIfTI with one file a modality, at one spacing.

NIfTI files are found by name, anywhere below the folder. The part before the last ``_`` is the patient; a file without
that part belongs to the patient that its folder is named for. So all of these are read by
``--modalities flair t1 t2 --label lesions``::

    DIR/patient01/flair.nii.gz, t1.nii.gz, t2.nii.gz, lesions.nii.gz
    DIR/patient01_flair.nii.gz, patient01_t1.nii.gz, patient01_t2.nii.gz, patient01_lesions.nii.gz
    DIR/images/patient01_flair.nii.gz ..., DIR/masks/patient01_lesions.nii.gz

All files of a patient must be on one grid: the same shape and affine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pathlib
import warnings
from collections.abc import Sequence

import monai.transforms as mt
import nibabel
import numpy as np
import pydicom
import skimage.draw
import torch
from monai.data import MetaTensor

#: How far apart, in mm, the elements of two files' affines may be.
AFFINE_TOLERANCE = 1e-3


class DataError(Exception):
    """An image or a contour set that is missing, corrupt or not what was expected; the message names the file."""


@dataclasses.dataclass
class Volume:
    """One patient: image (M, D, H, W) float32, label (1, D, H, W) uint8, the voxel's size in mm as (z, y, x)."""

    patient: str
    image: torch.Tensor
    label: torch.Tensor
    spacing: tuple[float, float, float]


def read_folder(
    folder: pathlib.Path,
    structure: str = "GTV-1",
    modalities: Sequence[str] = ("image",),
    label: str = "label",
    lesion_values: Sequence[int] = (1,),
) -> list[Volume]:
    """Every patient in a folder: sub-folders of DICOM files, or NIfTI files (see above)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (make demo fetches the lung CT; or give --data)")
    volumes = [read_dicom(p, structure) for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("*.dcm"))]
    for patient, files in sorted(find_nifti(folder, (*modalities, label)).items()):
        if files.keys() == {label}:
            continue  # a mask alone, of a patient whose images are not here
        for part in (*modalities, label):
            if part not in files:
                where = next(iter(files.values())).parent
                raise DataError(f"{where}: patient {patient} has no {part}.nii.gz and no {patient}_{part}.nii.gz")
        volumes.append(read_nifti(patient, [files[m] for m in modalities], files[label], lesion_values))
    if not volumes:
        raise DataError(
            f"{folder}: neither sub-folders with DICOM files nor NIfTI files named for {', '.join(modalities)} in it"
        )
    return volumes


def plain(x: torch.Tensor) -> torch.Tensor:
    """Without what MONAI's transforms note down with a tensor, which every later operation would carry along."""
    return x.as_tensor() if isinstance(x, MetaTensor) else torch.as_tensor(x)


def find_nifti(folder: pathlib.Path, parts: Sequence[str]) -> dict[str, dict[str, pathlib.Path]]:
    """For each patient the files of the parts (modalities, label) that it has."""
    found: dict[str, dict[str, pathlib.Path]] = {}
    for path in sorted(folder.rglob("*.nii*")):
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        for part in parts:
            if stem == part:
                patient = path.parent.name
            elif stem.endswith(f"_{part}"):
                patient = stem[: -len(part) - 1]
            else:
                continue
            other = found.setdefault(patient, {}).setdefault(part, path)
            if other != path:
                raise DataError(f"{path}: patient {patient} has the {part} twice, also as {other}")
    return found


@functools.cache
def _loader() -> mt.Compose:
    # MONAI makes a reader of every format that it knows, and those whose packages are missing say so.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        load = mt.LoadImage(reader="NibabelReader", ensure_channel_first=True, dtype=np.float32)
    return mt.Compose([load, mt.Orientation(axcodes="SAR", labels=None)])


def load_nifti(path: pathlib.Path) -> tuple[torch.Tensor, np.ndarray]:
    """The volume (1, D, H, W), its axes towards the head, the front and the right, and its affine."""
    try:
        header = nibabel.load(path).header
    except Exception as error:  # nibabel raises whatever its parser stumbles over
        raise DataError(f"{path}: not a readable NIfTI file: {error}") from error
    if len(header.get_data_shape()) != 3:
        raise DataError(f"{path}: expected a volume of three dimensions, got the shape {header.get_data_shape()}")
    try:
        volume = _loader()(path)
    except Exception as error:
        raise DataError(f"{path}: not a readable NIfTI file: {error}") from error
    if not torch.isfinite(volume).all():
        raise DataError(f"{path}: it has values that are not finite")
    return volume.as_tensor(), np.asarray(volume.affine)


def read_nifti(
    patient: str, images: Sequence[pathlib.Path], label_path: pathlib.Path, lesion_values: Sequence[int] = (1,)
) -> Volume:
    """A patient's modalities and the mask of the lesions. lesion_values: what in it is a lesion; the rest must be 0."""
    arrays = []
    first, affine = load_nifti(images[0])
    for path in (*images[1:], label_path):
        x, other = load_nifti(path)
        if x.shape != first.shape:
            raise DataError(
                f"{path}: expected the shape of {images[0].name}, {tuple(first.shape[1:])}, got {tuple(x.shape[1:])}"
            )
        apart = np.abs(affine - other).max()  # headers round
        if apart > AFFINE_TOLERANCE:
            raise DataError(
                f"{path}: expected the affine of {images[0].name}, so that a voxel of one is the voxel of the other; "
                f"they are up to {apart:.3g} apart; bring the files to one grid first"
            )
        arrays.append(x)
    *others, label = arrays
    values = [int(v) if v == int(v) else v for v in label.unique().tolist()]
    unknown = [v for v in values if v != 0 and v not in lesion_values]
    if unknown:
        raise DataError(
            f"{label_path}: expected a mask of 0 and {', '.join(map(str, lesion_values))} (see --lesion-values), got "
            f"{', '.join(map(str, unknown[:5]))}{' ...' if len(unknown) > 5 else ''}"
        )
    if not label.any():
        raise DataError(f"{label_path}: the mask is empty; a patient without a lesion cannot be scored")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return Volume(patient, torch.cat([first, *others]), (label > 0).to(torch.uint8), tuple(float(mm) for mm in spacing))


def read_dicom(folder: pathlib.Path, structure: str) -> Volume:
    """A CT series and the contours of one structure, filled slice by slice."""
    slices, contours = [], None
    for path in sorted(folder.glob("*.dcm")):
        try:
            data = pydicom.dcmread(path)
            if data.Modality == "RTSTRUCT":
                contours = data
            else:
                slices.append((float(data.ImagePositionPatient[2]), data, data.pixel_array))
        except Exception as error:  # pydicom raises whatever its parser stumbles over
            raise DataError(f"{path}: not a readable DICOM file: {error}") from error
    if not slices:
        raise DataError(f"{folder}: no CT slices in it")
    if contours is None:
        raise DataError(f"{folder}: no RTSTRUCT file in it")
    slices.sort(key=lambda s: s[0])
    heights = np.array([z for z, _, _ in slices])
    gaps = np.diff(heights)
    if len(slices) > 1 and (gaps.min() <= 0 or gaps.max() - gaps.min() > 0.01):
        raise DataError(f"{folder}: slices are missing or doubled: gaps from {gaps.min():.2f} to {gaps.max():.2f} mm")
    first = slices[0][1]
    if np.abs(np.array(first.ImageOrientationPatient, float) - (1, 0, 0, 0, 1, 0)).max() > 1e-3:
        raise DataError(f"{folder}: only axial slices are read, got the orientation {first.ImageOrientationPatient}")
    image = np.stack([p * float(s.RescaleSlope) + float(s.RescaleIntercept) for _, s, p in slices], dtype=np.float32)
    row_mm, column_mm = map(float, first.PixelSpacing)

    label = np.zeros(image.shape, np.uint8)
    numbers = {r.ROIName: r.ROINumber for r in contours.StructureSetROISequence}
    if structure not in numbers:
        raise DataError(f"{folder}: no structure {structure!r}, only {', '.join(numbers)}")
    for roi in contours.ROIContourSequence:
        if roi.ReferencedROINumber != numbers[structure]:
            continue
        for contour in roi.ContourSequence:
            points = np.array(contour.ContourData, float).reshape(-1, 3)
            k = int(np.abs(heights - points[0, 2]).argmin())
            rows = (points[:, 1] - float(first.ImagePositionPatient[1])) / row_mm
            columns = (points[:, 0] - float(first.ImagePositionPatient[0])) / column_mm
            # A contour inside another is a hole, hence exclusive or.
            label[k] ^= skimage.draw.polygon2mask(label.shape[1:], np.stack((rows, columns), 1)).astype(np.uint8)
    if not label.any():
        raise DataError(f"{folder}: the contours of {structure!r} enclose no voxel")
    thickness = float(gaps.mean()) if len(slices) > 1 else float(first.SliceThickness)
    return Volume(
        folder.name, torch.from_numpy(image)[None], torch.from_numpy(label)[None], (thickness, row_mm, column_mm)
    )


def prepare(
    volume: Volume, spacing: float | Sequence[float], window: tuple[float, float] | None, crop: bool = False
) -> Volume:
    """Crops to the head, resamples to ``spacing`` mm by area and scales the intensities.

    spacing: one number, or three as (z, y, x).
    window: the range that becomes [-1, 1], clipped, as for CT; None: zero mean and unit variance of each modality over
    the voxels that are not 0, as for MR.
    crop: cut away what is dark in every modality (less than a tenth of its 99th percentile), as around a head.
    """
    image, label = volume.image, volume.label
    if crop:
        bright = [0.1 * torch.quantile(x[x > 0][::16], 0.99) if (x > 0).any() else 0.0 for x in image.double()]
        head = torch.stack([x > level for x, level in zip(image, bright, strict=True)]).any(0, keepdim=True)
        both = mt.CropForegroundd(["image", "label"], source_key="head", margin=2, allow_smaller=True)(
            {"image": image, "label": label, "head": head.to(torch.uint8)}
        )
        image, label = plain(both["image"]), plain(both["label"])
    target = (float(spacing),) * 3 if isinstance(spacing, (int, float)) else tuple(map(float, spacing))
    size = [max(1, round(n * mm / t)) for n, mm, t in zip(image.shape[1:], volume.spacing, target, strict=True)]
    resize = mt.Resize(size, mode="area")
    image = plain(resize(image))
    label = (plain(resize(label.float())) >= 0.5).to(torch.uint8)
    if window is None:
        image = plain(mt.NormalizeIntensity(nonzero=True, channel_wise=True)(image))
    else:
        image = plain(mt.ScaleIntensityRange(*window, -1.0, 1.0, clip=True)(image))
    if not label.any():
        raise DataError(
            f"{volume.patient}: no lesion is left at {', '.join(f'{t:g}' for t in target)} mm; give a finer --spacing"
        )
    return Volume(volume.patient, image.contiguous(), label.contiguous(), target)
