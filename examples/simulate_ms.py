"""Simulates multiple sclerosis: real lesion masks on the MNI152 brain, with the contrasts of FLAIR, T1 and T2.

Not real images, and they must not be called so. Real is where the lesions lie and how they are shaped: the masks are
the consensus masks of real patients (open_ms_data, in MNI space). The brain is one brain for all, the MNI152 average,
deformed differently for each subject; contrasts, the bias field, noise and bright spots that are no lesions are drawn
at random, by the numbers below. A lesion is bright on FLAIR and T2 and dark on T1, in a strength of its own.

The brain comes from the package nilearn on PyPI, which is downloaded by pip and read as an archive, never installed
(Fonov et al. 2011, the MNI152 template ICBM 2009a).

    python examples/simulate_ms.py DIR --masks .data/open_ms --subjects 16
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import monai.transforms as mt
import nibabel
import nibabel.processing
import numpy as np
import packages
import torch
from scipy import ndimage
from tqdm import tqdm
from volumes import DataError, find_nifti

PACKAGE = "nilearn==0.14.1"
SHA256 = "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a"  # of its wheel
FOLDER = "nilearn/datasets/data/"
TISSUES = ("wm", "gm")
MODALITIES = ("flair", "t1", "t2")
#: Brightness of white matter, grey matter and liquor, and of a lesion at full strength; white matter is about 1.
CONTRASTS = {
    "flair": (1.00, 1.20, 0.35, 1.75),
    "t1": (1.00, 0.72, 0.30, 0.68),
    "t2": (1.00, 1.30, 2.10, 1.90),
}
CONTRAST_SPREAD = 0.05  # standard deviation of a subject's brightness of a tissue
STRENGTH = (0.45, 1.0)  # of a lesion, uniform
TEXTURE = 0.6  # how much of the T1 template's own detail goes into every modality
NOISE = 0.05  # standard deviation of Rician noise
BIAS = (0.0, 0.15)  # coefficients of the bias field's polynomial
SPOTS = 25  # bright spots on FLAIR that are no lesions: one to three millimetres, anywhere in the brain
DEFORMATION = {"sigma_range": (7, 9), "magnitude_range": (40, 90)}  # voxels of 1 mm, smoothed displacement
SCALE = 400  # of the stored integers
#: Where the patients' brains lie on the masks' grid, in mm from its first voxel, along its axes: smaller than the
#: MNI152 brain, which is brought to this box, so that lesions lie beside its ventricles as they did beside theirs.
BRAIN_BOX = ((25.0, 154.0), (28.0, 183.0), (17.0, 140.0))


def fetch_template(directory: pathlib.Path) -> dict[str, str]:
    """Names of the files of T1 and of the shares of white and grey matter; downloads them where one is missing."""
    names = {part: f"mni_icbm152_{part}_tal_nlin_sym_09a_converted.nii.gz" for part in ("t1", *TISSUES)}
    if not all((directory / name).is_file() for name in names.values()):
        packages.unpack(PACKAGE, SHA256, lambda n: n.endswith(tuple(names.values())), len(names), FOLDER, directory)
    return names


def template(masks_grid: nibabel.Nifti1Image, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The brain's T1 and its shares of white and grey matter and liquor on the masks' grid, each in [0, 1]."""
    names = fetch_template(directory)
    white = nibabel.load(directory / names["wm"])
    to_box = fit_to_box(white, masks_grid)
    maps = {}
    for part, name in names.items():
        image = nibabel.Nifti1Image(np.asarray(nibabel.load(directory / name).dataobj, np.float32), to_box)
        image = nibabel.processing.resample_from_to(image, masks_grid, order=1)
        x = np.asarray(image.dataobj, np.float32)
        maps[part] = np.clip(x / np.percentile(x, 99.9), 0, 1)
    brain = ndimage.binary_fill_holes(maps["wm"] + maps["gm"] > 0.25)
    brain = ndimage.binary_closing(brain, iterations=3)
    maps["csf"] = np.where(brain, np.clip(1 - maps["wm"] - maps["gm"], 0, 1), 0)
    maps["brain"] = brain.astype(np.float32)
    return maps


def fit_to_box(image: nibabel.Nifti1Image, masks_grid: nibabel.Nifti1Image) -> np.ndarray:
    """The affine that puts what is not 0 of the image into `BRAIN_BOX`."""
    voxels = np.argwhere(np.asarray(image.dataobj) > 0.1 * image.dataobj[:].max())
    edges = np.stack([voxels.min(0), voxels.max(0)])
    world = np.sort(nibabel.affines.apply_affine(image.affine, edges), 0)
    grid_mm = nibabel.affines.voxel_sizes(masks_grid.affine)
    box = np.sort(nibabel.affines.apply_affine(masks_grid.affine, np.array(BRAIN_BOX).T / grid_mm), 0)
    scale = (box[1] - box[0]) / (world[1] - world[0])
    return np.block([[np.diag(scale), (box[0] - scale * world[0])[:, None]], [np.zeros((1, 3)), 1]]) @ image.affine


def lesion_strength(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How much of a voxel looks like lesion: every lesion with a strength of its own and a soft edge."""
    lesions, count = ndimage.label(mask, np.ones((3, 3, 3)))
    strengths = np.concatenate([[0], random.uniform(*STRENGTH, count)]).astype(np.float32)
    return ndimage.gaussian_filter(strengths[lesions], 0.7)


def spots(brain: np.ndarray, random: np.random.Generator) -> np.ndarray:
    at = np.argwhere(brain > 0)[random.integers(0, int(brain.sum()), SPOTS)]
    points = np.zeros(brain.shape, np.float32)
    points[tuple(at.T)] = random.uniform(20, 80, SPOTS)
    return np.clip(ndimage.gaussian_filter(points, 1.2), 0, 1)


def simulate(maps: dict[str, np.ndarray], mask: np.ndarray, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One subject's modalities and its mask."""
    random = np.random.default_rng(seed)
    deform = mt.Rand3DElastic(prob=1.0, padding_mode="zeros", **DEFORMATION).set_random_state(seed)
    layers = [*(maps[k] for k in ("t1", "wm", "gm", "csf", "brain")), mask.astype(np.float32)]
    t1, wm, gm, csf, brain, mask = np.asarray(deform(torch.from_numpy(np.stack(layers)), mode="bilinear"))
    mask = (mask >= 0.5) & (brain > 0.5)
    strength, bright = lesion_strength(mask, random), spots(brain > 0.5, random)
    detail = t1 - ndimage.gaussian_filter(t1, 3)
    images = {}
    for name, (white, grey, liquor, lesion) in CONTRASTS.items():
        white, grey, liquor, lesion = np.array([white, grey, liquor, lesion]) * random.normal(1, CONTRAST_SPREAD, 4)
        image = white * wm + grey * gm + liquor * csf
        image = image * (1 + TEXTURE * detail * (1 if name == "t1" else -1))
        image = image + strength * (lesion - image)
        if name == "flair":
            image = image + 0.5 * bright
        image = torch.from_numpy(image[None].astype(np.float32))
        image = mt.RandBiasField(prob=1.0, coeff_range=BIAS).set_random_state(seed + len(images))(image)
        image = mt.RandRicianNoise(prob=1.0, std=NOISE, sample_std=False).set_random_state(seed + 100 + len(images))(
            image
        )
        images[name] = np.asarray(image)[0] * (brain > 0.5)
    return images, mask


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path, help="where the subjects go: simulatedNN_{flair,t1,t2,lesions}")
    parser.add_argument("--masks", type=pathlib.Path, required=True, metavar="DIR", help="has NAME_lesions.nii.gz")
    parser.add_argument("--subjects", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--template", type=pathlib.Path, default=pathlib.Path(".data/mni152"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        masks = {p: f["lesions"] for p, f in find_nifti(arguments.masks, ["lesions"]).items()}
        if not 1 <= arguments.subjects <= len(masks):
            raise DataError(f"--subjects: expected 1 to {len(masks)}, the masks in {arguments.masks}")
        loaded = {p: nibabel.load(path) for p, path in masks.items()}
        loads = {p: int(np.asarray(image.dataobj).astype(bool).sum()) for p, image in loaded.items()}
    except (DataError, OSError, nibabel.filebasedimages.ImageFileError) as error:
        print(f"simulate_ms: {error}", file=sys.stderr)
        return 2
    # From the smallest lesion load to the largest, in even steps; then in the patients' order, so that folds are mixed.
    by_load = sorted(loads, key=loads.get)
    steps = np.linspace(0, len(by_load) - 1, arguments.subjects).round().astype(int)
    chosen = sorted(by_load[i] for i in steps)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    grid = loaded[chosen[0]]
    maps = template(grid, arguments.template)
    for number, patient in enumerate(tqdm(chosen, desc="simulating", unit="subject"), start=1):
        mask = np.asarray(loaded[patient].dataobj).astype(bool)
        if mask.shape != grid.shape or np.abs(loaded[patient].affine - grid.affine).max() > 1e-3:
            print(f"simulate_ms: {masks[patient]}: expected the grid of {masks[chosen[0]]}", file=sys.stderr)
            return 2
        images, lesions = simulate(maps, mask, arguments.seed * 1000 + number)
        for name, x in [*images.items(), ("lesions", lesions)]:
            scaled = x.astype(np.uint8) if name == "lesions" else (x * SCALE).round().astype(np.int16)
            path = arguments.directory / f"simulated{number:02d}_{name}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(scaled, grid.affine), path)
    (arguments.directory / "README.txt").write_text(
        "Simulated images of multiple sclerosis, made by simulate_ms.py: not of patients.\n"
        f"Masks: {', '.join(chosen)} of {arguments.masks.name}; brain: MNI152 of {PACKAGE}; seed {arguments.seed}.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
