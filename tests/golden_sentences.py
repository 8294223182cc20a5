"""Sentences to hold whole: what a line says, in a folder with a `teacher` and a `student` converted from it.

Other tests name the error, the setting and the remedy alone, so that wording is cheap to improve. Run by
`launch/test_mistakes.py`.
"""

from __future__ import annotations

GOLDEN = {
    "benchmark operators --output_dir x --tokens 197":
        "--tokens 197: there is no grid of so many patches; take 196 (14 x 14), and --prefix for a class token",
    "benchmark models --output_dir x vit_tiny_patch16_224 --plan linear":
        "plan entry 'linear' has no colon between layers and operator: write e.g. '*: linear; 9-11: softmax'",
    "benchmark models --output_dir x vit_tiny_patch16_224 --plan '*: linear' --img_size 100":
        "--img_size 100: patches of 16 pixels do not fill it; take 96",
    "benchmark energy pvt_v2_b0 --addition_pj -1": "--addition_pj -1.0: give a number, 0 or more",
    "convert teacher --plan '*: linear'":
        "--output_dir is missing: give a new folder, or --dry_run to see only the table",
    "convert teacher --plan '2: linear' --output_dir x": "plan: there is no layer 2; the model has layers 0 to 1",
    "convert teacher --plan '*: keep' --output_dir x":
        "--plan '*: keep' keeps every layer: name an operator other than softmax",
    "convert teacher --plan '*: linear' --output_dir x --calibrate 4":
        "--calibrate 4 needs images: give --data_path FOLDER, or --dataset digits",
    "convert teacher --plan '*: linear' --output_dir x --dataset digits":
        "--dataset and --data_path need --calibrate N: give N, the number of images",
    "convert teacher --plan '1: hash' --output_dir x":
        "--plan has hash, which must be fitted to images: give --calibrate N with --dataset or --data_path",
    "export teacher model.tflite": "model.tflite must end in .onnx (ONNX) or .pt2 (torch.export)",
    "export teacher model.pt2 --format onnx": "model.pt2 contradicts format 'onnx', whose files end in .onnx",
    "checkpoint save teacher x --max_shard_size 5":
        "--max_shard_size is '5'; write a number with KB, MB, GB or TB, such as 5GB",
    "checkpoint save teacher x --model vit_base_patch16_224":
        "model='vit_base_patch16_224', but teacher says it is 'vit_tiny_patch16_224'; leave model out",
    "checkpoint save teacher x --revision v1":
        "revision='v1' is of the hub, and 'teacher' is on this disk: leave it out",
    "checkpoint stripp teacher":
        "unknown action 'stripp'; did you mean 'strip'? valid: convert, info, inspect, save, strip",
    "hybrid teacher --dataset digits":
        "--output_dir is missing: give a folder, in which everything that is measured stays",
    "data": "data.data_path is not set: give the data set's folder, or data.dataset=digits to try",
    "data digits --out no/look.png":
        "argument --out: 'no/look.png' cannot be written: its folder does not exist; create it first; "
        "see `graftvit data --help`",
    "programs check 'mm(q k)'": "mm is not defined for N×D and N×D, in mm(q k)",
    "programs search teacher --output_dir x": "a search needs images: give --data_path FOLDER, or --dataset digits",
    "programs search report gone": "gone has no search: give the --output_dir of `graftvit programs search`",
    "programs bench run attnbench_digits --output_dir x --backbone plane":
        "--backbone plane: the recipe has no such name; did you mean 'plain'? valid: plain, pyramid",
    "train --epoch 3": "unknown flag '--epoch', did you mean '--epochs'?",
    "train --blr abc": "--blr is 'abc', but must be a number above 0 (base learning rate for 256 images)",
    "train --blr": "--blr needs a value: a number above 0",
    "train blrr=3": "unknown key 'blrr', did you mean 'optim.blr'?",
    "train --mode distill":
        "--mode is 'distill', a value of the attention-transfer code: give --mode transfer --method distill",
    "evaluate": "the following arguments are required: CHECKPOINT; see `graftvit evaluate --help`",
    "evaluate teacher --metrics top --dataset digits":
        "--metrics is 'top', and 'top' is not a metric; did you mean 'top1'? valid: distance, knn, probe, seg_knn, "
        "seg_probe, top1",
    "jobs logs ''":
        "argument RUN: '' is not a folder: give the folder of a run or of a sweep; see `graftvit jobs logs "
        "--help`",
    "jobs summary .":
        ". is not a sweep, because it has no sweep.json: give the output_dir of `graftvit submit --sweep`",
    "submit digits_scratch --site none.yaml": "--site none.yaml does not exist",
    "submit digits_scratch --sweep seed":
        "--sweep 'seed' has no values; write key=value,value,..., as in --sweep seed=0..4 or --sweep "
        "'transfer.layers=first:6,[0,3,5],all'",
    "submit digits_scratch --sweep seed=4..0": "--sweep seed: the range '4..0' has 0 values; give 1 to 1000",
    "push teacher vit": "'vit' is no repository name: write org/name, of letters, digits, '-', '_' and '.'",
    "train s3://bucket/mine.yaml":
        "cannot read the configuration: s3://bucket/mine.yaml: give a path on this machine, such as a mounted "
        "folder, not a URL",
    "train digits_distill --teacher none --dry_run":
        "mode=transfer needs a teacher: set teacher.source to a timm name, a hub name or a path",
    "train cifar10_copy --dry_run --layers first:99":
        "transfer.layers='first:99' needs a number from 1 to 12, the depth of the student; give another "
        "--layers (in Python layers), such as all",
    "compare digits_scratch":
        "digits_scratch has no section 'compare'; add compare: {plans: {linear: '*: linear', ...}}, or take the "
        "recipe digits_compare",
    "visualize student": "no IMAGE is given: name files, folders of images, or digits:0, or give --average",
    "visualize student digits:0 --layers 2 --output_dir x":
        "--layers: there is no layer 2; the model has layers 0 to 1",
}  # fmt: skip
