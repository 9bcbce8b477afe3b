"""What is done to the package and must not go wrong: rows 1 to 44 of the fault table, and what a row is.

`fault_rows_running.py` has the rest. `test_fault_table.py` holds all of it against the tests that there are, and
`docs/faults.md` against all of it.
"""

from dataclasses import dataclass

__all__ = ["FILES_ROWS", "NO_ENDPOINT", "PENDING", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """A fault, what happens, and where that is tested.

    `names`: tests of the row begin with `test_` and one of them. `code`: the command's exit code, or codes. `tests`
    and `slow`: the files with its tests that run by default and with `scripts/test --slow`, without `test_` and
    `.py`. `untested`: what of it is not, and why.
    """

    number: int
    names: str
    fault: str
    happens: str
    code: str = "-"
    tests: str = ""
    slow: str = ""
    untested: str = ""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names of its tests begin with."""
        return tuple(f"test_{name}" for name in self.names.split())

    @property
    def files(self) -> set[tuple[str, bool]]:
        """Every file of its tests, and whether they are the slow ones."""
        parts = ((self.tests, False), (self.slow, True))
        return {(f"test_{stem}.py", slow) for stems, slow in parts for stem in stems.split()}


NO_ENDPOINT = "needs a served endpoint, which is not here: predict and eval are commands that end"

# fmt: off
PENDING: dict[int, str] = {}
"""Rows of which a test is on its way: a name in a file that need not be there yet."""

FILES_ROWS = (
    Row(1, "parity_all_variants_fp32", "every variant beside timm and transformers, GRN's gamma and beta random",
        "logits within 1e-5, stages within 1e-4, parameters as tabled; files in ONNX Runtime within the FP32 gate",
        "3", "faults_parity model runners", "faults_parity model"),
    Row(2, "parity_fp16_stress_no_overflow",
        "activations at 2 to 50 times FP16's limit; black, white, chequered images",
        "finite, cosine 0.9995 at least; the same graph with sums in FP16 fails", "3",
        "faults_parity fp16_safety mutants", "fp16_safety"),
    Row(3, "parity_detects_broken_grn", "eps, gamma, beta, axes of GRN changed one at a time; other parts too",
        "the gate fails, an export is refused", "3", "model mutants parity", "mutants"),
    Row(4, "parity_nan_never_passes", "NaN in one side's logits, or in both", "fails, and says how many", "3",
        "agreement deploy_properties layers parity"),
    Row(5, "parity_inf_not_equal", "the same infinity on both sides", "fails; no flag lets it pass", "3", "parity"),
    Row(6, "parity_shape_or_name_mismatch", "an output renamed, of another shape, or with other values",
        "a message of its own for each", "3 (logits of two shapes: 2)", "faults_parity onnx_checks parity"),
    Row(7, "batch_invariance", "an image alone and among others",
        "the same logits within 1e-5; a sum over the batch fails", "3",
        "deploy_properties emulator faults_parity parity runners"),
    Row(8, "dynamic_batch_bounds", "the smallest, typical and largest batch; none and one more than the largest",
        "the first three run; the others are refused with the range", "2", "faults_inputs runners tensorrt_runner",
        untested="an engine on a GPU: not run, a double stands in"),
    Row(9, "dynamic_resolution", "files of 224, 256, 288 and 384 px; 225 px; another size than the file's",
        "each equals PyTorch; the others are refused", "2", "faults_inputs model runners", "faults_files"),
    Row(10, "wrong_dtype_input", "float64, half or bytes to a file of floats",
        "refused with the type it takes, not cast", "2", "faults_inputs runners"),
    Row(11, "wrong_layout_input", "channels last to a file of channels first", "refused with a hint", "2",
        "faults_inputs runners"),
    Row(12, "wrong_input_name", "a foreign file with an input more, none of images, another type or an open size",
        "refused with what it takes; one that fails while it runs is one message", "2 (while it runs: 1)",
        "faults_inputs"),
    Row(13, "nan_inf_input", "NaN or infinity in the pixels a caller gives, or in the logits",
        "pixels: refused with the image's index, unless takes_nonfinite is set; logits: no answer, JSON without NaN",
        "2, 3", "evaluation faults_inputs prediction",
        untested="pixels on a GPU are not looked at; their logits are"),
    Row(14, "empty_and_truncated_image", "0 bytes, half a file, in each format",
        "a row with its reason, the rest are answered; Pillow's truncated load stays off", "2",
        "cli data faults_images faults_inputs prediction"),
    Row(15, "decompression_bomb_png", "50,000 x 50,000 pixels in kilobytes; gigabytes in a chunk beside them",
        "refused before it is decoded, within 50 MB", "2", "data faults_images"),
    Row(16, "disallowed_image_format", "FITS, EPS, SVG, text, an animation, another format under .jpg",
        "refused by content: JPEG, PNG, WebP and BMP alone", "2", "data faults_images"),
    Row(17, "odd_images", "CMYK, 16 bits, palette with alpha, one pixel, turned by EXIF, grey, EXIF that is broken",
        "8-bit RGB as Pillow and timm make it", "-", "data faults_images"),
    Row(18, "preprocess_parity", "the same file through timm's evaluation transform", "within 1 of 255", "-", "data"),
    Row(19, "pickle_malicious_pt", "a pickle that runs a function, under any name; TorchScript",
        "refused, nothing runs", "4", "weight_files"),
    Row(20, "pickle_no_unsafe_fallback", "a pickle that needs a global torch does not allow",
        "refused after one try with weights_only", "4", "faults_inputs"),
    Row(21, "pickle_zip_bomb_pt", "entries that unpack to gigabytes, overlap or claim more than there is",
        "refused before memory is taken", "4", "faults_weights"),
    Row(22, "safetensors_header_too_large", "a length of 2^63, a header of 200 MB", "corrupt, at once", "4",
        "faults_weights"),
    Row(23, "safetensors_bad_offsets",
        "overlap, hole, beyond the end, wrong shape or type, no JSON, no UTF-8, named twice",
        "corrupt, each with its reason", "4", "faults_weights"),
    Row(24, "checkpoint_truncated", "cut at ten points, in either format",
        "corrupt; never a model that is loaded in part", "4", "weight_files", "faults_weights"),
    Row(25, "checkpoint_wrong_variant", "weights of another variant, missing, surplus and misshaped tensors",
        "refused with a table of what differs; loading is strict", "2", "checkpoint"),
    Row(26, "checkpoint_nan_weights", "NaN or infinity in one tensor",
        "corrupt, by the tensor's name; no flag lets it in", "4", "checkpoint"),
    Row(27, "checkpoint_layout_variants",
        "layouts of the reference, timm, transformers; a backbone; FCMAE without a head",
        "identical logits; without a head a new one has to be asked for", "2", "layouts"),
    Row(28, "onnx_garbage onnx_truncated", "random bytes, a file cut off, bits flipped",
        "cut and damaged: corrupt, no crash; what nothing but its name calls ONNX: wrong input",
        "4 (by name alone: 2)", "faults_foreign_onnx", "faults_foreign_onnx"),
    Row(29, "onnx_checker_full_and_shapes",
        "an exported file; foreign domains, counts, opsets, types that do not fit",
        "ONNX's full check passes, standard operators of a short list; the others are refused by name", "3, 4",
        "faults_files onnx_checks onnx_export"),
    Row(30, "onnx_over_2gib", "huge in FP32, 2.6 GB", "weights in a file beside the graph, found from any folder",
        "-", "onnx_export", "faults_files"),
    Row(31, "onnx_extdata_traversal", "weights at ../x or an absolute path; of an initializer, deep in a node",
        "refused before a byte is read", "4", "faults_outside_data", untested="from bytes: none is read so"),
    Row(32, "onnx_extdata_symlink onnx_extdata_parent_symlink onnx_extdata_hardlink",
        "weights behind a link of any kind, or in a pipe", "refused", "4", "faults_outside_data"),
    Row(33, "onnx_extdata_bad_ranges", "offsets and lengths that are negative, no numbers, beyond the file",
        "corrupt, no memory is taken", "4", "faults_outside_data"),
    Row(34, "onnx_extdata_unknown_keys", "keys that no one knows, of Python's own names, twice", "refused", "4",
        "faults_outside_data"),
    Row(35, "onnx_extdata_missing onnx_extdata_swapped", "the weights' file absent, or another of the same size",
        "corrupt, by the hash in the manifest; without one where it is absent", "4",
        "custody faults_outside_data onnx_export"),
    Row(36, "onnx_hostile_graph", "cycles, a million nodes, loops, huge constants, custom operators, functions",
        "refused by limits before a parser reads it, or in a child with limits of time and memory", "4",
        "faults_foreign_onnx"),
    Row(37, "engine_truncated", "cut at ten points; a runtime that gives null",
        "corrupt by size before anything reads it; null is an error", "4", "custody deserialising tensorrt_runner"),
    Row(38, "engine_bit_flip", "one byte at a hundred offsets",
        "corrupt by hash; TensorRT's own validity check is not asked, for it sees nothing", "4",
        "custody deserialising faults_files tensorrt_runner", "deserialising"),
    Row(39, "engine_is_onnx onnx_is_engine", "each under the other's name", "named by what it is", "0", "custody"),
    Row(40, "engine_wrong_runtime_version", "built with another release", "refused with both and the command", "5",
        "custody tensorrt_runner"),
    Row(41, "engine_wrong_flavour", "an engine of the TensorRT that is not installed", "the package is named", "5",
        "custody"),
    Row(42, "engine_wrong_sm", "built for another GPU", "refused with both", "5", "custody tensorrt_runner",
        untested="the running half needs a GPU: not run"),
    Row(43, "engine_unsigned_or_unlisted",
        "an engine that no manifest names, or no key where `--signed` asks for one", "refused", "4",
        "cli custody signing_commands"),
    Row(44, "engine_embedded_plugin", "an engine with a library inside",
        "none is ever put in; host code is off wherever an engine is read; Polygraphy's loader is not used", "4",
        "faults_files", untested="an engine that has one: building it takes a library and reading it a GPU"),
)
