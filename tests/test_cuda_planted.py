"""Bugs planted in the CUDA kernels are found by their tests on the host."""

from __future__ import annotations

import re
import shutil
import signal

import pytest
from host_build import build_on_host
from processes import ROOT, assert_passed, run_kernels_of

pytestmark = pytest.mark.compiled

FINAL_LOOP = "for (int i = threadIdx.x; i < kValues"
MEMORY_READ = "__syncthreads();  // the memory has been read"
PLANTED = {
    "a barrier is missing": ("counting.cuh", f"__syncthreads();\n  {FINAL_LOOP}", FINAL_LOOP),
    "a barrier is not for all": (
        "counting.cuh",
        f"__syncthreads();\n  {FINAL_LOOP}",
        f"if (warp > 0) __syncthreads();\n  {FINAL_LOOP}",
    ),
    "a voxel too many": ("voxels.cuh", "end < v.voxels ? end : v.voxels", "end < v.voxels + 1 ? end : v.voxels + 1"),
    "a voxel too few": ("voxels.cuh", "at >= first; at -=", "at > first; at -="),
    "a piece too few": ("voxels.cuh", "(pieces - 1 - place)", "(pieces - 2 - place)"),
    "two blocks take the same voxels": (
        "voxels.cuh",
        "blocks.pieces + longer_before",
        "blocks.pieces + 0 * longer_before",
    ),
    "a sum is forgotten": ("counting.cuh", "for (int w = 0; w < warps; ++w)", "for (int w = 1; w < warps; ++w)"),
    "shared memory is not cleared": ("tiled.cu", "sums[i] = A(0);", ";"),
    "the other class": ("few.cu", "counts[4] = counts[3];", "counts[4] = counts[2];"),
    "shared memory is used again too early": ("split.cuh", MEMORY_READ, ""),
    "a label's sums are not cleared": ("counting.cuh", "mine[i * kOfThreads + j] = A(0);", ";"),
    "a label's sums are the next one's": (
        "counting.cuh",
        "tp(int c) const { return mine[(c + 1)",
        "tp(int c) const { return mine[c",
    ),
    "what is brought ahead is not waited for": ("split.cuh", "wait_for_copies();", ""),
    "the next voxels are brought too early": (
        "split.cuh",
        "      wait_for_copies();\n      const bool all_known",
        "      if (next >= 0) expect(v, rows, row, lane, next);\n      wait_for_copies();\n      const bool all_known",
    ),
    "the next voxels of few classes are brought too early": (
        "few.cu",
        "      wait_for_copies();\n      ahead.take(z);",
        "      if (next >= 0) expect(next);\n      wait_for_copies();\n      ahead.take(z);",
    ),
    "a thread's sums are of several columns": ("table.cu", "/ period * period", ""),
    "a block does not wait for the others' counts": (
        "table.cu",
        "atomicAdd(a.finished, 1u) == gridDim.x - 1",
        "atomicAdd(a.finished, 1u) == 0",
    ),
    "a voxel of a pack is taken twice": (
        "interleaved.cuh",
        "kSplitVoxels + k) * classes",
        "kSplitVoxels + k / 2) * classes",
    ),
    "a tile is read before it is filled": (
        "interleaved.cuh",
        "synchronise(lane);  // the others' copies are there",
        "//",
    ),
    "the next tile is brought to this one": (
        "interleaved.cuh",
        "bring(v, rows, lane, at, other)",
        "bring(v, rows, lane, at, tile)",
    ),
    "the next labels are brought too early": (
        "interleaved.cuh",
        "      all_known = take_split_labels",
        "      if (next >= 0) expect(v, rows, row, lane, next);\n      wait_for_copies();\n"
        "      all_known = take_split_labels",
    ),
    "a lane's turn comes too often": ("interleaved.cuh", "- start - turn +", "- start +"),
    "a label's logit stays among the others": (
        "split.cuh",
        "if (kTargets == Targets::kTaken)",
        "if (kTargets == Targets::kUntold)",
    ),
    "the label's logit is smoothed as another's": (
        "split.cuh",
        "Targets::kStay && target == j",
        "Targets::kStay && target == -2",
    ),
    "logarithms of other lanes' labels are forgotten": (
        "split_labels.cu",
        "for (int j = -1; j < kClasses; ++j) log_sums",
        "for (int j = 0; j < kClasses; ++j) log_sums",
    ),
    "a dense target's classes are all lanes' first": (
        "split.cuh",
        "start + lane.first_class * v.target.class_stride",
        "start + 0 * v.target.class_stride",
    ),
    "what a dense target ignores counts": (
        "split.cuh",
        "leave_out_ignored(v, lane, g, labels);\n    if",
        "bad |= false;\n    if",
    ),
    "the next dense targets are brought too early": (
        "split.cuh",
        "    if (kAhead && targets.come_ahead()) {",
        "    if (kAhead && next >= 0) {\n      expect(v, rows, targets, lane, next);\n      wait_for_copies();\n    }\n"
        "    if (kAhead && targets.come_ahead()) {",
    ),
    "dense targets are another class's": (
        "split.cuh",
        "(slot<X>(slots, j), row)",
        "(slot<X>(slots, j > 0 ? j - 1 : j), row)",
    ),
    "the two classes' targets are exchanged": ("split_targets.cu", "add(0, g[0][k], first,", "add(0, g[1][k], first,"),
    "the largest exponential is one of many": ("split.cuh", "of_lane.add(e == A(1), e)", "of_lane.add(e < A(0), e)"),
    "rows of a tile lie in each other": ("interleaved.cuh", "row.stride > row.pieces ?", "row.stride < row.pieces ?"),
    "a lane is not asked": ("split.cuh", "if (log_of_warp > 1)", "if (log_of_warp > 2)"),
    "the wrong lane is asked": ("split.cuh", "* slots + slot;", "* slots;"),
    "the wrong channel": ("voxels.cuh", "share.sample % v.classes", "0"),
    "a channel's voxels are not told apart": ("own_targets.cuh", "start, voxel, v.target.voxel_stride", "start, 0, 1"),
    "what other warps still read is overwritten": (
        "split.cuh",
        "max_over_lanes<kTops, Combine::kSteps>",
        "max_over_lanes<kSums, Combine::kSteps>",
    ),
    "warps that share voxels do not wait": (
        "split.cuh",
        "synchronise_warps(1 + (",
        "if (warp < 0) synchronise_warps(1 + (",
    ),
    "a warp is not asked": ("split.cuh", "if (warps > 2) {", "if (warps > 4) {"),
    "a class too many": ("split.cuh", "j < kClasses - 2 || j < own", "j < kClasses"),
    "a logit is too large for its exponential": ("own_targets.cuh", "largest <= A(80)", "largest <= A(1e9)"),
    "a soft target has the focal factor of a hard one": ("own_targets.cuh", "between == A(0)", "between >= A(0)"),
    "a region has another one's sums": ("regions.cu", "if (found != region_) flush();", ";"),
    "the last region's sums are forgotten": ("regions.cu", "      sums.flush();\n", ""),
    "a voxel in no region counts": ("regions.cu", "if (t.id_rows == 1 && region < 0) t.label(k) = kUncounted;", ""),
    "a block's table is left out": ("regions.cu", "s < kSlices; ++s", "s < kSlices - 1; ++s"),
    "a merged class keeps its probability": ("regions.cu", "if (c > 0) z = static_cast<A>(-INFINITY);", ""),
    "a merged class has no part of the gradient": ("regions.cu", "(c == 0 || is_merged(merged, c))", "c == 0"),
}
#: The source that a bug in a header is compiled for, where it is not few.cu.
COMPILED_FOR = {
    "a voxel too few": "channels",
    "interleaved.cuh": "split_labels",
    "own_targets.cuh": "channels",
    "split.cuh": "split_labels",
    "a dense target's classes are all lanes' first": "split_targets",
    "what a dense target ignores counts": "split_targets",
    "the next dense targets are brought too early": "split_targets",
    "dense targets are another class's": "split_targets",
    "the largest exponential is one of many": "split_targets",
    "the wrong channel": "channels",
}
#: The tests that find one, where it is not these.
ANY_OTHER = "test_softmax"
FOUND_BY = {
    "a voxel too few": "test_many_blocks_of_dense_targets and sigmoid",
    "two blocks take the same voxels": "test_many_blocks",
    "shared memory is used again too early": "test_many_blocks or test_channels_last",
    "the next voxels are brought too early": "test_many_blocks",
    "the next voxels of few classes are brought too early": "test_many_blocks and 4",
    "a thread's sums are of several columns": "test_many_samples and 22",
    "a block does not wait for the others' counts": "test_many_samples",
    "a voxel of a pack is taken twice": "test_channels_last",
    "a dense target's classes are all lanes' first": "test_dense_targets and 20",
    "what a dense target ignores counts": "test_many_classes_of_other_options and 33",
    "the next dense targets are brought too early": "test_many_blocks_of_contiguous and 18",
    "dense targets are another class's": "test_many_blocks_of_contiguous and 18",
    "the two classes' targets are exchanged": "test_many_blocks_of_contiguous and 2-",
    "the largest exponential is one of many": "test_nearly_perfect_prediction",
    "the label's logit is smoothed as another's": "test_label_smoothing and 20",
    "logarithms of other lanes' labels are forgotten": "test_label_smoothing and 20",
    "a tile is read before it is filled": "test_channels_last and 40",
    "the next tile is brought to this one": "test_channels_last and 40",
    "the next labels are brought too early": "test_channels_last and 40",
    "a lane's turn comes too often": "test_channels_last and 30",
    "rows of a tile lie in each other": "test_channels_last",
    "the wrong channel": "test_many_blocks_of_dense_targets and sigmoid",
    "a channel's voxels are not told apart": "test_many_blocks_of_dense_targets and sigmoid",
    "what other warps still read is overwritten": "test_channels_last and 40",
    "warps that share voxels do not wait": "test_channels_last and 40",
    "a warp is not asked": "test_many_classes and 118",
    "a logit is too large for its exponential": "test_sigmoid_of_channels",
    "a soft target has the focal factor of a hard one": "test_sigmoid_of_channels",
    "a region has another one's sums": "test_regions",
    "the last region's sums are forgotten": "test_regions",
    "a voxel in no region counts": "test_what_is_in_no_region",
    "a block's table is left out": "test_regions_of_many_blocks",
    "a merged class keeps its probability": "test_annotated",
    "a merged class has no part of the gradient": "test_annotated",
}


#: What is found in bfloat16 alone, where more is brought ahead.
IN_BFLOAT16 = (
    "a tile is read before it is filled",
    "the next tile is brought to this one",
    "the next labels are brought too early",
)


def plant(where, objects, files, source, dtype="float32"):
    """A library of the host build's objects with files of csrc/cuda, {name: (right, wrong)}, changed for one source: of
    kernels for one type of logits, which halves its compilation; others raise "left out"."""
    shutil.copytree(ROOT / "csrc", where / "csrc")
    for file, (right, wrong) in files.items():
        path = where / "csrc" / "cuda" / file
        text = path.read_text()
        assert right in text
        path.write_text(text.replace(right, wrong))
    path = where / "csrc" / "cuda" / "dispatch.h"
    text, (kept, type_name) = path.read_text(), {"float32": ("Float", "float"), "bfloat16": ("BFloat16",) * 2}[dtype]
    cases = re.search(r"switch \(type\) \{\n    case ElementType::kDouble: return f.*?\n  \}\n", text, re.DOTALL)[0]
    only = f'if (type == ElementType::k{kept}) return f({type_name}{{}});\n  throw std::runtime_error("left out");\n'
    path.write_text("#include <stdexcept>\n" + text.replace(cases, only))
    others = [o for o in objects if not o.name.endswith(f"_{source}.o")]
    build_on_host(where / "csrc" / "cuda", where / "bug.so", "-O0", only=(source,), objects=others)
    return where / "bug.so"


def run_planted(library, tests, dtype="float32"):
    type_of_logits = "bfloat16" if dtype == "bfloat16" else "not float16 and not float64"
    tests = ("-x", "-k", f"({tests}) and {type_of_logits}")
    result = run_kernels_of(library, *tests, environment={"TK_EMULATION_SEED": "3"})
    assert "left out" not in result.stdout, "a test of another type of logits"
    return result


@pytest.mark.parametrize("bug", list(PLANTED))
def test_planted_bugs_are_found(bug, host_build, tmp_path):
    """The checks above can fail."""
    file, *change = PLANTED[bug]
    source = file.removesuffix(".cu") if file.endswith(".cu") else COMPILED_FOR.get(bug, COMPILED_FOR.get(file, "few"))
    dtype = "bfloat16" if bug in IN_BFLOAT16 else "float32"
    library = plant(tmp_path, host_build[1], {file: change}, source, dtype)
    result = run_planted(library, FOUND_BY.get(bug, ANY_OTHER), dtype)
    # Some write where they should not, and the process dies of it.
    assert result.returncode in (1, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS), result.stdout[-2000:]


def test_a_wrong_mask_is_found(host_build, tmp_path):
    change = {"platform.h": ("kFullWarp = 0xffffffffu", "kFullWarp = 0x0000ffffu")}
    result = run_planted(plant(tmp_path, host_build[1], change, "few"), ANY_OTHER)
    assert result.returncode == 1, result.stdout[-2000:]
    assert "not in the mask of its own warp operation" in result.stdout


@pytest.mark.parametrize(("source", "dtype"), [("few", "float32"), ("split_labels", "bfloat16")])
def test_without_a_bug_none_is_found(source, dtype, host_build, tmp_path):
    library = plant(tmp_path, host_build[1], {}, source, dtype)
    assert_passed(run_planted(library, f"{ANY_OTHER} or test_channels_last and 40", dtype), 10)
