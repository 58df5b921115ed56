"""Tables and pictures of the study, made of its rows alone (slices: of the predictions that study.py keeps).

    python examples/study_report.py runs/study --out docs/study --page docs/study.md

The page's tables stand between ``<!-- NAME -->`` and ``<!-- /NAME -->`` and are replaced.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from evaluate import THRESHOLDS
from recipes import BASELINE, BETAS, RECIPES
from scipy import stats
from study import DATA_SETS, SEEDS, find_folder, read_data, read_rows

#: Fractions that tables show as percent; the paper's first.
PERCENT = ("DSC", "sensitivity", "specificity", "F2", "APR", "precision", "lesion_sensitivity")
HEADINGS = {"lesion_sensitivity": "lesions found", "false_lesions": "false lesions"}
PAPER = {
    0.5: (53.42, 49.85, 99.93, 51.77, 52.57),
    0.6: (54.57, 55.85, 99.91, 55.47, 54.34),
    0.7: (56.42, 56.85, 99.93, 57.32, 56.04),
    0.8: (48.57, 61.00, 99.89, 54.53, 53.31),
    0.9: (46.42, 65.57, 99.87, 56.11, 51.65),
}
RESAMPLES = 5000
COLOURS = dict(zip(RECIPES, [*plt.cm.viridis(np.linspace(0, 0.85, 5)), *plt.cm.tab10([1, 3, 7, 6, 8, 5])], strict=True))


def patients_of(rows: list[dict]) -> pd.DataFrame:
    """One line for each patient of each run."""
    lines = []
    for row in rows:
        for patient in row["patients"]:
            line = {k: row[k] for k in ("data", "recipe", "fold", "seed")} | patient
            of_curve = line.pop("curve")
            middle = len(THRESHOLDS) // 2
            found = of_curve["tp"][middle] + of_curve["fp"][middle]
            line["precision"] = of_curve["tp"][middle] / found if found else np.nan
            lines.append(line)
    return pd.DataFrame(lines)


def grid(table: pd.DataFrame, recipe: str, name: str) -> pd.DataFrame:
    """patients x seeds."""
    return table[table.recipe == recipe].pivot(index="patient", columns="seed", values=name)


def resampled_means(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples: of the patients, and for each of the seeds. values: (patients, seeds)."""
    patients, seeds = values.shape
    at = random.integers(0, patients, (RESAMPLES, patients, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that has no value at all is NaN
        return np.nanmean(values[at, random.integers(0, seeds, (RESAMPLES, patients, seeds))], axis=(1, 2))


def interval(values: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
    low, high = np.nanpercentile(resampled_means(values, random), [2.5, 97.5])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
    """To the baseline, paired by patient and seed. p: Wilcoxon's signed-rank test over patients (means of seeds)."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def is_clear(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(table: pd.DataFrame, recipe: str, name: str, baseline: str = BASELINE) -> Difference | None:
    ours, theirs = grid(table, recipe, name), grid(table, baseline, name)
    common = ours.columns.intersection(theirs.columns)
    d = (ours[common] - theirs[common]).dropna(how="all")
    if d.empty:
        return None
    random = np.random.default_rng(0)
    of_patients = d.mean(axis=1).to_numpy()
    p = stats.wilcoxon(of_patients).pvalue if np.any(of_patients) else 1.0
    return Difference(float(np.nanmean(d)), *interval(d.to_numpy(), random), float(p))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means, their spread over patients (of means of seeds) and over seeds (of means of patients), for each recipe."""
    lines = []
    for recipe in [r for r in RECIPES if (table.recipe == r).any()]:
        line = {"recipe": recipe, "runs": len(table[table.recipe == recipe].groupby(["fold", "seed"]))}
        for name in (*PERCENT, "false_lesions"):
            values = grid(table, recipe, name)
            line[name] = np.nanmean(values) if values.notna().any(axis=None) else np.nan
            line[f"{name}_sd_patients"] = values.mean(axis=1).std(ddof=1)
            line[f"{name}_sd_seeds"] = values.mean(axis=0).std(ddof=1) if values.shape[1] > 1 else np.nan
            d = None if recipe == BASELINE else difference(table, recipe, name)
            for key in ("mean", "low", "high", "p"):
                line[f"{name}_difference_{key}"] = np.nan if d is None else getattr(d, key)
        lines.append(line)
    return pd.DataFrame(lines)


# ---- Tables of the page


def markdown(headings: list[str], lines: list[list[str]]) -> str:
    table = [headings, ["---"] + ["---:"] * (len(headings) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def figure(value: float, name: str, sign: bool = False) -> str:
    if np.isnan(value):
        return "–"
    value = 100 * value if name in PERCENT else value
    digits = 2 if name == "specificity" else 1
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def table_of_means(of: pd.DataFrame) -> str:
    names = (*PERCENT[:5], "lesion_sensitivity", "false_lesions")
    headings = ["", *(HEADINGS.get(n, n) for n in names), "runs"]
    lines = []
    for line in of.to_dict("records"):
        cells = [f"{figure(line[n], n)} ± {figure(line[f'{n}_sd_patients'], n)}" for n in names]
        lines.append([RECIPES[line["recipe"]].words, *cells, str(line["runs"])])
    return markdown(headings, lines)


def table_of_differences(of: pd.DataFrame) -> str:
    names = ("DSC", "sensitivity", "F2", "APR", "lesion_sensitivity", "false_lesions")
    lines = []
    for line in of[of.recipe != BASELINE].to_dict("records"):
        cells = []
        for n in names:
            mean, low, high, p = (line[f"{n}_difference_{k}"] for k in ("mean", "low", "high", "p"))
            clear = low > 0 or high < 0
            text = f"{figure(mean, n, True)} ({figure(low, n, True)} to {figure(high, n, True)}), p {p:.2g}"
            cells.append(f"**{text}**" if clear else text)
        lines.append([RECIPES[line["recipe"]].words, *cells])
    return markdown(["less Dice", *(HEADINGS.get(n, n) for n in names)], lines)


def table_one(summaries: dict[str, pd.DataFrame]) -> str:
    names = PERCENT[:5]
    headings = ["α / β", *(f"{n}" for n in names)]
    lines = []
    for beta, recipe in BETAS.items():
        cells = []
        for i, n in enumerate(names):
            ours = [
                figure(of[of.recipe == recipe][n].iloc[0], n) if (of.recipe == recipe).any() else "–"
                for of in summaries.values()
            ]
            cells.append(" / ".join([f"**{PAPER[beta][i]:.{2 if n == 'specificity' else 1}f}**", *ours]))
        lines.append([f"{1 - beta:.1f} / {beta:.1f}", *cells])
    return markdown(headings, lines)


def findings(name: str, table: pd.DataFrame, of: pd.DataFrame) -> str:
    """What the intervals say, in words: nobody's opinion."""
    patients, seeds = table.patient.nunique(), table.seed.nunique()
    sentences = [
        f"{patients} patients, {seeds} seed{'s' * (seeds > 1)}. With {patients} patients the smallest p that the "
        f"paired test can give is {2 / 2**patients:.2g}."
    ]
    for metric in ("sensitivity", "DSC", "F2", "APR"):
        clear, unclear = [], []
        for recipe in of.recipe[of.recipe != BASELINE]:
            line = of[of.recipe == recipe].iloc[0]
            low, high = (line[f"{metric}_difference_{k}"] for k in ("low", "high"))
            if low > 0 or high < 0:
                mean = figure(line[f"{metric}_difference_mean"], metric, True)
                clear.append(f"{RECIPES[recipe].words} ({mean})")
            else:
                unclear.append(RECIPES[recipe].words)
        text = f"{metric}: " + (
            f"the interval excludes Dice's value for {', '.join(clear)}" if clear else "no recipe can be told from Dice"
        )
        if clear and unclear:
            text += f"; not to be told from Dice: {', '.join(unclear)}"
        sentences.append(text + ".")
    best = of.sort_values("F2", ascending=False).recipe.iloc[0]
    sentences.append(f"Highest mean F2: {RECIPES[best].words}.")
    return "\n".join(f"- {s}" for s in sentences)


#: The paper's claims: words, the figure that must be higher, of which recipe, than of which.
CLAIMS = (
    ("β = .7 finds more lesion voxels than Dice", "sensitivity", "tversky-.7", BASELINE),
    ("β = .9 finds more than β = .7", "sensitivity", "tversky-.9", "tversky-.7"),
    ("β = .7 has a higher DSC than Dice", "DSC", "tversky-.7", BASELINE),
    ("β = .7 has a higher F2 than Dice", "F2", "tversky-.7", BASELINE),
    ("β = .7 has a higher APR than Dice", "APR", "tversky-.7", BASELINE),
    ("β = .7 has a higher DSC than β = .9", "DSC", "tversky-.7", "tversky-.9"),
    ("β = .7 has a higher F2 than sample re-weighting", "F2", "tversky-.7", "ce-weighted"),
    ("β = .7 has a higher F2 than balanced sampling", "F2", "tversky-.7", "ce-balanced"),
    ("β = .7 has a higher F2 than two-step training", "F2", "tversky-.7", "ce-two-step"),
    ("β = .7 has a higher F2 than Dice + CE", "F2", "tversky-.7", "dice-ce"),
)


def table_of_claims(tables: dict[str, pd.DataFrame]) -> str:
    lines = []
    for words, metric, recipe, baseline in CLAIMS:
        cells = []
        for table in tables.values():
            there = set(table.recipe)
            d = difference(table, recipe, metric, baseline) if {recipe, baseline} <= there else None
            if d is None:
                cells.append("–")
                continue
            verdict = "cannot tell" if not d.is_clear else "**yes**" if d.mean > 0 else "**no**"
            cells.append(f"{verdict} ({figure(d.mean, metric, True)})")
        lines.append([words, *cells])
    return markdown(["", *tables], lines)


def progress(rows: list[dict]) -> str:
    """How much of the study the page is made of."""
    parts = []
    for name in DATA_SETS:
        of = [r for r in rows if r["data"] == name]
        begun = {(r["fold"], r["seed"]) for r in of}
        complete = [x for x in begun if len({r["recipe"] for r in of if (r["fold"], r["seed"]) == x}) == len(RECIPES)]
        seeds = len({seed for _, seed in complete})
        words = f"{len(complete)} folds with all recipes, {seeds} of {SEEDS[name]} seeds"
        parts.append(f"{name}: {len(of)} runs, {words}")
    return f"Made of {len(rows)} runs. " + "; ".join(parts) + "."


def table_of_cost(rows: list[dict]) -> str:
    lines = []
    for name in DATA_SETS:
        of = [r for r in rows if r["data"] == name]
        if not of:
            continue
        ours = [r for r in of if not r["recipe"].startswith("ce")]
        lines.append(
            [
                name,
                f"{np.median([r['seconds'] for r in of]):.0f}",
                f"{np.median([1e3 * r['training_seconds'] / (20 * len(r['loss'])) for r in of]):.0f}",
                f"{np.median([r['loss_ms'] for r in ours]):.2f}",
                f"{100 * np.median([r['loss_share'] for r in ours]):.2f} %",
                str(sorted({r["threads"] for r in of})).strip("[]"),
            ]
        )
    headings = ["", "seconds a run", "ms a step", "our loss, ms", "its share of the step", "threads"]
    return markdown(headings, lines)


def area_estimates(table: pd.DataFrame) -> str:
    apart = (table.APR - table.APR_lower_trapezoid).abs()
    return (
        f"Over all {len(table)} patients of all runs the average precision and Boyd et al.'s lower trapezoid differ by "
        f"{100 * apart.median():.2g} percentage points in the median and by {100 * apart.max():.2g} at most, where "
        "many voxels share the probability that float32 rounds to 1."
    )


# ---- Pictures


def panels(names: list[str], height: float = 4.2, columns: int = 2):
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, height * rows), layout="constrained", squeeze=False
    )
    for empty in axes.flat[len(names) :]:
        empty.axis("off")
    return figure, dict(zip(names, axes.flat, strict=False))


def title(name: str, table: pd.DataFrame) -> str:
    runs = len(table.groupby(["fold", "seed"]))
    return f"{DATA_SETS[name].words}\n{table.patient.nunique()} patients, {runs} runs a setting"


def save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def draw_precision_recall(rows: list[dict], tables: dict[str, pd.DataFrame], path: pathlib.Path) -> None:
    figure, axes = panels(list(tables))
    for name, table in tables.items():
        for recipe in RECIPES:
            curves = [p["curve"] for r in rows if r["data"] == name and r["recipe"] == recipe for p in r["patients"]]
            if not curves:
                continue
            # Voxels of all patients and seeds together.
            tp, fp = (np.sum([c[k] for c in curves], 0, dtype=float) for k in ("tp", "fp"))
            lesion = sum(c["lesion"] for c in curves)
            with np.errstate(invalid="ignore"):
                precision = tp / (tp + fp)
            style = {"lw": 1.8} if recipe.startswith("tversky") else {"lw": 1.4, "ls": "--"}
            ax = axes[name]
            ax.plot(tp / lesion, precision, color=COLOURS[recipe], label=RECIPES[recipe].words, **style)
            middle = len(THRESHOLDS) // 2
            ax.plot(tp[middle] / lesion, precision[middle], "o", ms=4, color=COLOURS[recipe])
        axes[name].set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
        axes[name].set_title(title(name, table), fontsize=10)
        axes[name].grid(alpha=0.3)
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Voxels of all held-out patients and seeds together; the dot is the threshold 0.5")
    save(figure, path)


def ceilings(study: pathlib.Path) -> dict[str, float]:
    """The mean DSC of a second rater against the first, where there is one."""
    found = {}
    for path in sorted(study.glob("agreement_*.json")):
        agreed = json.loads(path.read_text())
        if agreed:
            found[path.stem.removeprefix("agreement_")] = float(np.mean([r["DSC"] for r in agreed]))
    return found


def draw_ceiling(ax, name: str, of_raters: dict[str, float]) -> None:
    if name in of_raters:
        value = 100 * of_raters[name]
        ax.axhline(value, color="black", ls=":", lw=1)
        ax.text(0.01, value + 1, "DSC of the second rater", transform=ax.get_yaxis_transform(), fontsize=8)


def draw_beta(tables: dict[str, pd.DataFrame], of_raters: dict[str, float], path: pathlib.Path) -> None:
    names = ("sensitivity", "precision", "F2", "DSC")
    figure, axes = panels(list(tables))
    for name, table in tables.items():
        for i, metric in enumerate(names):
            random = np.random.default_rng(0)
            values = {b: grid(table, r, metric).to_numpy() for b, r in BETAS.items() if (table.recipe == r).any()}
            means = np.array([100 * np.nanmean(v) for v in values.values()])
            ends = 100 * np.array([interval(v, random) for v in values.values()])
            at = np.array(list(values)) + 0.006 * (i - 1.5)
            error = np.abs(ends.T - means)
            axes[name].errorbar(at, means, error, fmt="o-", ms=4, capsize=3, label=metric, color=f"C{i}")
        draw_ceiling(axes[name], name, of_raters)
        axes[name].set(xlabel="β (weight of false negatives; α = 1 − β)", ylabel="percent", ylim=(0, 100))
        axes[name].set_title(title(name, table), fontsize=10)
        axes[name].grid(alpha=0.3)
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("Mean over patients and seeds, with 95 % intervals (bootstrap over patients and seeds)")
    save(figure, path)


def draw_patients(tables: dict[str, pd.DataFrame], of_raters: dict[str, float], path: pathlib.Path) -> None:
    figure, axes = panels(list(tables), height=4.6)
    for name, table in tables.items():
        recipes = [r for r in RECIPES if (table.recipe == r).any()]
        values = [100 * grid(table, r, "DSC").mean(axis=1) for r in recipes]
        boxes = axes[name].boxplot(values, whis=(0, 100), patch_artist=True, medianprops={"color": "black"})
        for box, recipe in zip(boxes["boxes"], recipes, strict=True):
            box.set(facecolor=COLOURS[recipe], alpha=0.6)
        for i, of_recipe in enumerate(values, start=1):
            axes[name].plot(np.full(len(of_recipe), i), of_recipe, ".", color="black", ms=4)
        axes[name].set_xticks(
            range(1, len(recipes) + 1), [RECIPES[r].words for r in recipes], rotation=60, ha="right", fontsize=8
        )
        draw_ceiling(axes[name], name, of_raters)
        axes[name].set(ylabel="DSC, percent", ylim=(0, 100))
        axes[name].set_title(title(name, table), fontsize=10)
        axes[name].grid(alpha=0.3, axis="y")
    figure.suptitle("Each point is a patient (mean of its seeds); boxes: quartiles, whiskers: all")
    save(figure, path)


def draw_losses(rows: list[dict], tables: dict[str, pd.DataFrame], path: pathlib.Path) -> None:
    figure, axes = panels(list(tables), height=3.6)
    for name, table in tables.items():
        for recipe in RECIPES:
            losses = [r["loss"] for r in rows if r["data"] == name and r["recipe"] == recipe]
            if losses:
                mean = np.mean(losses, 0)
                axes[name].plot(
                    20 * np.arange(1, len(mean) + 1), mean, color=COLOURS[recipe], label=RECIPES[recipe].words
                )
        axes[name].set(xlabel="step", ylabel="training loss", yscale="log")
        axes[name].set_title(title(name, table), fontsize=10)
        axes[name].grid(alpha=0.3)
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle("Mean of 20 steps and of all runs of a setting; losses of different recipes are not to be compared")
    save(figure, path)


FOUND, MISSED, FALSE = "#2ca02c", "#d62728", "#1f77b4"


def prediction(study: pathlib.Path, row: dict, patient: str) -> np.ndarray | None:
    """What study.py kept of a run: whether the probability was at least 0.5; None where it is not there."""
    path = study / "predictions" / f"{row['run'].replace('/', '_')}_{patient}.npz"
    if not path.exists():
        return None
    kept = np.load(path)
    return np.unpackbits(kept["predicted"], count=np.prod(kept["shape"])).reshape(kept["shape"]).astype(bool)


def draw_slices(
    study: pathlib.Path, rows: list[dict], name: str, folder: pathlib.Path, path: pathlib.Path, images: bool
) -> None:
    """A patient with many lesions and one with few, Dice beside beta = 0.7: the paper's figures 3 and 4.

    images: draw on the image; otherwise on the head's outline, as for patients' images, which are not published here.
    """
    volumes = sorted(read_data(name, folder, rows[0]["setting"]), key=lambda v: v.label.sum().item())
    compared = (BASELINE, "tversky-.7")
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 9.2), layout="constrained")
    for line, (volume, words) in zip(axes, ((volumes[-1], "dense"), (volumes[0], "sparse")), strict=True):
        truth = volume.label[0].numpy().astype(bool)
        at = int(truth.sum((1, 2)).argmax())
        for ax, recipe in zip(line, compared, strict=True):
            of = [
                r
                for r in rows
                if (r["data"], r["recipe"], r["seed"]) == (name, recipe, 0)
                and any(p["patient"] == volume.patient for p in r["patients"])
            ]
            found = prediction(study, of[0], volume.patient) if of else None
            if found is None:
                raise SystemExit(
                    f"study_report: {study}: no prediction of {name}/{recipe} for {volume.patient}, seed 0"
                )
            slice_of = volume.image[0, at].numpy()
            if images:
                ax.imshow(slice_of, cmap="gray", origin="lower", interpolation="nearest")
            else:
                ax.contour(volume.image[0, at].numpy() != 0, levels=[0.5], colors="0.6", linewidths=0.8)
                ax.set_aspect("equal")
            for mask, colour in ((truth & found, FOUND), (truth & ~found, MISSED), (found & ~truth, FALSE)):
                paint = np.zeros((*slice_of.shape, 4))
                paint[mask[at]] = matplotlib.colors.to_rgba(colour, 0.85)
                ax.imshow(paint, origin="lower", interpolation="nearest")
            (patient,) = [p for p in of[0]["patients"] if p["patient"] == volume.patient]
            ax.set_title(
                f"{words} case, {RECIPES[recipe].words}\nDSC {100 * patient['DSC']:.0f} %, sensitivity "
                f"{100 * patient['sensitivity']:.0f} % of the whole volume",
                fontsize=9,
            )
            ax.axis("off")
    handles = [
        plt.Line2D([], [], marker="s", ls="", color=colour, label=label)
        for colour, label in ((FOUND, "found"), (MISSED, "missed"), (FALSE, "false"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(f"{DATA_SETS[name].words}\nthe axial slice with the most lesion, seed 0")
    save(figure, path)


# ---- The page


def fill(page: str, parts: dict[str, str]) -> str:
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.S)
        if not pattern.search(page):
            raise SystemExit(f"study_report: the page has no <!-- {name} --> ... <!-- /{name} -->")
        page = pattern.sub(lambda m, text=text: m[1] + text + "\n" + m[2], page)
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=pathlib.Path, help="a folder with rows.jsonl, as study.py writes it")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="for tables and pictures (the study's folder)")
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="a Markdown file whose tables are replaced")
    parser.add_argument("--slices", action="append", default=[], metavar="DATA", help="draw slices of a data set")
    parser.add_argument("--images", action="store_true", help="on real patients' images too, not on outlines alone")
    parser.add_argument("--data", type=pathlib.Path, action="append", default=[], metavar="DIR", help="as study.py")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.study
    rows = read_rows(arguments.study / "rows.jsonl")
    if not rows:
        print(f"study_report: {arguments.study / 'rows.jsonl'}: no rows", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    everything = patients_of(rows)
    # Of a data set that has only begun there is nothing to compare.
    tables = {name: of for name in DATA_SETS if (of := everything[everything.data == name]).recipe.nunique() > 1}
    if not tables:
        print("study_report: no data set has runs of two recipes yet", file=sys.stderr)
        return 2
    summaries = {name: summary(table) for name, table in tables.items()}
    parts = {
        "table 1": table_one(summaries),
        "claims": table_of_claims(tables),
        "progress": progress(rows),
        "cost": table_of_cost(rows),
        "area": area_estimates(everything),
    }
    for name, of in summaries.items():
        of.round(5).to_csv(out / f"summary_{name}.csv", index=False)
        parts |= {
            f"means {name}": table_of_means(of),
            f"differences {name}": table_of_differences(of),
            f"findings {name}": findings(name, tables[name], of),
        }
        ceiling = arguments.study / f"agreement_{name}.json"
        if ceiling.exists() and (agreed := json.loads(ceiling.read_text())):
            parts[f"agreement {name}"] = markdown(
                ["second rater", *PERCENT[:4]],
                [[r["patient"], *(figure(r[n], n) for n in PERCENT[:4])] for r in agreed],
            )
    draw_precision_recall(rows, tables, out / "precision_recall.png")
    of_raters = ceilings(arguments.study)
    draw_beta(tables, of_raters, out / "beta.png")
    draw_patients(tables, of_raters, out / "patients.png")
    draw_losses(rows, tables, out / "losses.png")
    for name in arguments.slices:
        folder = find_folder(name, [*arguments.data, pathlib.Path(".data")]) if name in DATA_SETS else None
        if folder is None:
            raise SystemExit(f"study_report: --slices {name}: no such data set, or no folder of it (see --data)")
        images = arguments.images or name == "ms-simulated"
        draw_slices(arguments.study, rows, name, folder, out / f"slices_{name}.png", images)
    if arguments.page:
        page = arguments.page.read_text()
        for name in DATA_SETS.keys() - tables.keys():
            for kind in ("findings", "means", "differences"):
                if f"<!-- {kind} {name} -->" in page:
                    parts[f"{kind} {name}"] = "Not run yet."
        arguments.page.write_text(fill(arguments.page.read_text(), parts))
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in parts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
