"""Reads labelled volumes: DICOM CT with an RTSTRUCT contour set, or NIfTI pairs, and brings them to one spacing."""

from __future__ import annotations

import dataclasses
import pathlib

import monai.transforms as mt
import nibabel
import numpy as np
import pydicom
import skimage.draw
import torch

#: How far apart the elements of an image's affine and its label's may be.
AFFINE_TOLERANCE = 1e-3


class DataError(Exception):
    """An image or a contour set that is missing, corrupt or not what was expected; the message names the file."""


@dataclasses.dataclass
class Volume:
    """One patient: image (1, D, H, W) float32, label (1, D, H, W) uint8, the voxel's size in mm as (z, y, x)."""

    patient: str
    image: torch.Tensor
    label: torch.Tensor
    spacing: tuple[float, float, float]


def read_folder(folder: pathlib.Path, structure: str = "GTV-1") -> list[Volume]:
    """Every patient in a folder: sub-folders of DICOM files, or pairs NAME_image.nii.gz and NAME_label.nii.gz."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (make demo fetches the lung CT; or give --data)")
    volumes = [read_dicom(p, structure) for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("*.dcm"))]
    for image in sorted(folder.glob("*_image.nii*")):
        volumes.append(read_nifti(image, image.with_name(image.name.replace("_image.nii", "_label.nii"))))
    if not volumes:
        raise DataError(f"{folder}: neither sub-folders with DICOM files nor NAME_image.nii.gz in it")
    return volumes


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


def read_nifti(image_path: pathlib.Path, label_path: pathlib.Path) -> Volume:
    """A NIfTI image and its label, any label above 0 being the lesion."""
    arrays = []
    for path in (image_path, label_path):
        if not path.exists():
            raise DataError(f"{path}: no such file")
        try:
            file = nibabel.as_closest_canonical(nibabel.load(path))
            arrays.append((np.asarray(file.dataobj, dtype=np.float32), file.header.get_zooms()[:3], file.affine))
        except Exception as error:  # nibabel raises whatever its parser stumbles over
            raise DataError(f"{path}: not a readable NIfTI file: {error}") from error
    (image, zooms, affine), (label, _, label_affine) = arrays
    if image.ndim != 3 or image.shape != label.shape:
        raise DataError(f"{label_path}: expected a label of the image's shape {image.shape}, got {label.shape}")
    # Where a voxel lies, in mm: headers round.
    apart = np.abs(affine - label_affine).max()
    if apart > AFFINE_TOLERANCE:
        raise DataError(
            f"{label_path}: expected the image's affine, so that a voxel of one is the voxel of the other; they are up "
            f"to {apart:.3g} apart; bring the label to the image's grid first"
        )
    image, label = image.transpose(2, 1, 0), label.transpose(2, 1, 0)
    if not np.isfinite(image).all():
        raise DataError(f"{image_path}: it has values that are not finite")
    if not np.isfinite(label).all():
        raise DataError(f"{label_path}: it has values that are not finite, which are neither lesion nor background")
    return Volume(
        image_path.name.split("_image.nii")[0],
        torch.from_numpy(image.copy())[None],
        torch.from_numpy((label > 0).astype(np.uint8))[None],
        tuple(float(z) for z in zooms[::-1]),
    )


def prepare(volume: Volume, spacing: float, window: tuple[float, float] | None) -> Volume:
    """Resamples to isotropic ``spacing`` mm by area and scales the intensities.

    ``window``: the range that becomes [-1, 1], clipped, as for CT; None: zero mean and unit variance, as for MR.
    """
    size = [max(1, round(n * mm / spacing)) for n, mm in zip(volume.image.shape[1:], volume.spacing, strict=True)]
    resize = mt.Resize(size, mode="area")
    image = torch.as_tensor(resize(volume.image)).contiguous()
    label = (torch.as_tensor(resize(volume.label.float())) >= 0.5).to(torch.uint8)
    if window is None:
        image = (image - image.mean()) / image.std().clamp(min=1e-6)
    else:
        image = torch.as_tensor(mt.ScaleIntensityRange(*window, -1.0, 1.0, clip=True)(image))
    return Volume(volume.patient, image.contiguous(), label.contiguous(), (spacing,) * 3)
