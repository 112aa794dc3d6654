"""Flags of other trainers: which of ours has the same meaning, or what to use instead.

From the command lines of facebookresearch/moco (`main_moco.py`, `main_lincls.py`, the CIFAR demo) and moco-v3, lightly
and lightly-train, solo-learn, mmselfsup, timm, DINO, SimSiam, PyTorch Lightning and torchvision's references. To teach
fastmoco another one, add it here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastmoco.config.flags import Flags

POSITIONAL = "DATA"  # stands for a command's data, given without a flag


class Same(NamedTuple):
    """Flags that mean what one of ours does.

    ours    the first of these that a command has; DATA is its data without a flag
    values  what they set, for flags that have no value of their own
    """

    names: str
    ours: str
    values: str = ""


class Instead(NamedTuple):
    """Flags without an equivalent, and what to do instead; `commands` to which the answer applies, or all."""

    names: str
    answer: str
    commands: str = ""


_TORCHRUN = (
    "use --gpus N for N GPUs of this machine; for several machines, start with torchrun -m fastmoco, which sets the "
    "address and the ranks"
)
_ONE_GPU = "choose the GPU with CUDA_VISIBLE_DEVICES=N, or use --gpus N for several"
_FILE_FIRST = "name the file without a flag: fastmoco eval FILE"

SAME = (
    Same("-a --model --model-name --backbone --backbone-name --backbone.name --model.name --net --network", "--arch"),
    Same("-j --num-workers --num-worker --n-workers --loader.num-workers --data.num-workers", "--workers"),
    Same("-b --batch --bs --bsz --loader.batch-size --optimizer.batch-size", "--batch-size --linear-batch-size"),
    Same("--batch-size", "--linear-batch-size"),
    Same("--learning-rate --base-lr --optimizer.lr", "--lr --linear-lr"),
    Same("--lr", "--linear-lr"),
    Same("--weight-decay --optimizer.weight-decay", "--wd --linear-wd"),
    Same("--wd", "--linear-wd"),
    Same("--momentum --optimizer.momentum", "--sgd-momentum"),
    Same("--max-epochs --num-epochs --n-epochs --trainer.max-epochs", "--epochs --linear-epochs"),
    Same("--epochs", "--linear-epochs"),
    Same("--lr-decay-epochs --lr-decay-steps --milestones", "--schedule"),
    Same("--cosine --cosine-lr --cos-lr", "--cos"),
    Same("--warmup --lr-warmup-epochs --warmup-epoch --scheduler.warmup-epochs", "--warmup-epochs"),
    Same("--min-lr --lr-min --eta-min", "--final-lr"),
    Same("--opt", "--optimizer"),
    Same("-p --print-freq --log-freq --log-interval --log-every-n-steps", "--log-every"),
    Same(
        "--data-path --data-dir --data-folder --dataset --train-data --train-dir --train-path", f"--data {POSITIONAL}"
    ),
    Same("--train-data-path --data.train-path --input-dir --img-dir --image-dir --root", f"--data {POSITIONAL}"),
    Same("--data", POSITIONAL),
    Same("--results-dir --output --output-dir --save-dir --save-path --work-dir --log-dir --logdir", "--out"),
    Same("--checkpoint-dir --exp-dir --run-dir", "--out"),
    Same("--img-size --image-size --input-size --size --transform.image-size", "--crop-size"),
    Same("--moco-temperature --temperature --temp --tau --method-kwargs.temperature", "--moco-t --knn-t"),
    Same("--queue-size --memory-bank-size --nce-k --method-kwargs.queue-size", "--moco-k"),
    Same("--ema --ema-momentum --ema-decay --momentum-teacher --base-tau-momentum --momentum.base-tau", "--moco-m"),
    Same("--feature-dim --feat-dim --dim --proj-output-dim --method-kwargs.proj-output-dim", "--moco-dim"),
    Same("--proj-hidden-dim --moco-mlp-dim --hidden-dim --method-kwargs.proj-hidden-dim", "--head"),
    Same("--sync-bn --sync-batchnorm", "--bn-splits", "1"),
    Same("--crop-min --min-scale --crop-scale --min-crop-scale", "--crop-scale-min"),
    Same("--horizontal-flip-prob --hflip-prob --hf-prob --random-flip", "--hflip"),
    Same("--no-flip --no-hflip", "--hflip", "0"),
    Same("--resume-from-checkpoint --ckpt-path", "--resume-from"),
    Same("--vertical-flip-prob --vflip-prob --vf-prob", "--vflip"),
    Same("--no-vflip", "--vflip", "0"),
    Same("--cj-strength --jitter-strength --color-jitter-strength --colour-jitter", "--color-jitter"),
    Same("--no-color-jitter --no-jitter --no-colour-jitter", "--color-jitter", "0"),
    Same("--grayscale-prob --gray-scale-prob --random-gray-scale --random-grayscale --greyscale --gray", "--grayscale"),
    Same("--no-grayscale --no-gray --no-greyscale --no-grey", "--grayscale", "0"),
    Same("--gaussian-blur --gaussian-blur-prob --gaussian-prob --blur-prob", "--blur"),
    Same("--no-blur --no-gaussian-blur", "--blur", "0"),
    Same("--solarization-prob --solarize-prob --solarise", "--solarize"),
    Same("--no-solarize --no-solarise", "--solarize", "0"),
    Same("--normalize --normalise --normalisation", "--normalization"),
    Same("--use-wandb --log-wandb", "--wandb"),
    Same("--use-mlflow --log-mlflow", "--mlflow"),
    Same("--precision", "--amp"),
    Same("--fp16 --use-fp16 --half", "--amp", "fp16"),
    Same("--bf16 --bfloat16", "--amp", "bf16"),
    Same("--fp32", "--amp", "fp32"),
    Same("--grad-checkpointing --gradient-checkpointing --activation-checkpointing", "--checkpoint-activations"),
    Same("--torchcompile --torch-compile", "--compile", "default"),
    Same("--checkpoint-hist --save-top-k --max-keep-ckpts", "--keep-checkpoints"),
    Same("--devices --num-gpus --ngpus --ngpu --nproc-per-node --nproc", "--gpus"),
    Same("--random-seed --manual-seed", "--seed"),
    Same("--nb-knn --knn-neighbors --n-neighbors -k", "--knn-k"),
    Same("--load-from --pretrained-weights --pretrained --weights --init-from --checkpoint", "--init --backbone"),
    Same("--num-images -n --max-images", "--count --limit"),
    Same("--format --target --export-format", "--to"),
)

INSTEAD = (
    Instead(
        "--pretrained --pretrained-weights --checkpoint --ckpt --ckpt-path --weights --model-path", _FILE_FIRST, "eval"
    ),
    Instead("--pretrained --checkpoint --ckpt", "name the run or file without a flag: fastmoco export RUN", "export"),
    Instead("--multiprocessing-distributed --dist-url --dist-backend --world-size --rank --local-rank", _TORCHRUN),
    Instead("--nnodes --node-rank --nodes --num-nodes --master-addr --master-port --launcher --strategy", _TORCHRUN),
    Instead("--gpu --gpu-id --gpu-ids --gpu-index", _ONE_GPU),
    Instead("--accelerator", "use --device cuda or --device cpu; auto takes a GPU if there is one"),
    Instead("--start-epoch --initial-epoch", "a resumed run knows its epoch: use --resume with --out RUN"),
    Instead("--auto-resume --resume-interrupted", "use --resume with --out RUN"),
    Instead("-e --evaluate --eval --test-only", "use fastmoco eval RUN --probes linear"),
    Instead("--batch-size-per-gpu --batch-size-per-device --batch-per-gpu", "use --batch-size, the images of all GPUs"),
    Instead("--samples-per-gpu --imgs-per-gpu", "use --batch-size, the images of all GPUs"),
    Instead(
        "--max-steps --steps --num-steps --total-steps --max-iters --iters", "use --epochs, which --schedule counts too"
    ),
    Instead("--warmup-steps --warmup-iters", "use --warmup-epochs"),
    Instead(
        "--lr-schedule --lr-scheduler --lr-policy --scheduler --scheduler.name --sched --cos-schedule",
        "use --cos, or --schedule with the epochs of a step schedule",
    ),
    Instead(
        "--save-freq --saveckp-freq --save-every --save-interval --checkpoint-freq --checkpoint-interval",
        "use --checkpoint-every, in steps",
    ),
    Instead("--eval-freq --eval-every --val-freq --eval-interval --knn-freq", "use --knn-every, in epochs"),
    Instead(
        "--method --ssl-method --algorithm --framework",
        "MoCo is the only method; fastmoco recipes lists its versions, such as fastmoco train imagenet-v2",
    ),
    Instead(
        "--cfg-options --config-name --config-path --cfg", "use --config FILE with the config.json of a run, and flags"
    ),
    Instead(
        "--scale --train-scale --random-resized-crop --rrc-scale",
        "use --crop-scale-min, the smallest area; the largest is 1",
    ),
    Instead(
        "--cj-prob --color-jitter-prob --jitter-prob",
        "the probability is that of --aug; use --color-jitter for the strength",
    ),
    Instead(
        "--brightness --contrast --saturation --hue", "use --color-jitter, a factor on all four strengths of --aug"
    ),
    Instead(
        "--global-crops-scale --local-crops-scale --local-crops-number --num-crops --n-crops --nmb-crops",
        "MoCo has two views of an image; use --crop-scale-min for the smallest area of a crop",
    ),
    Instead(
        "--augmentation --augment --augmentations --transform --transforms --auto-augment --aa",
        "use --aug v1, v2, cifar or byol",
    ),
    Instead("--num-classes --class-map", "classes follow from the folders of the images, see --data"),
    Instead(
        "--logger --project --tb-dir",
        "metrics go to metrics.jsonl and tb/ (--tensorboard); --wandb and --mlflow send them there; WANDB_PROJECT "
        "and MLFLOW_EXPERIMENT_NAME apply",
    ),
    Instead(
        "--pin-mem --pin-memory --no-pin-memory --persistent-workers --prefetch-factor --drop-last --shuffle",
        "the pipeline does that by itself: use --pipeline and --workers",
    ),
    Instead(
        "--channels-last --memory-format",
        "the encoders are channels-last by default; use --stem-format for the first layer",
    ),
    Instead(
        "--clip-grad --clip-grad-norm --grad-clip --gradient-clip-val",
        "MoCo trains without; lower --lr, or use --warmup-epochs",
    ),
    Instead(
        "--accumulate-grad-batches --accum-iter --grad-accum --gradient-accumulation-steps",
        "accumulation gives fewer negatives a step; use a smaller --batch-size, or --checkpoint-activations",
    ),
)

_VALUES = (
    (r"--device=mps", "--device mps: Apple's MPS is not used, since it has no float64: use --device cpu"),
    (r"--device=(gpu|\d+)", "--device {0}: use --device cuda, and CUDA_VISIBLE_DEVICES=N to choose among several GPUs"),
    (r"--device=cuda:(\d+)", "--device cuda:{0}: use CUDA_VISIBLE_DEVICES={0} and --device cuda"),
)


def translate(name: str, flags: Flags, command: str) -> tuple[str, list[str]] | str | None:
    """What a flag that the command does not have means to it.

    Returns our flag and its values (none if they follow it), an answer in a sentence, or None for a flag that nobody
    has.
    """
    for same in SAME:
        if name in same.names.split():
            for ours in same.ours.split():
                if ours in flags.takes or (ours == POSITIONAL and "data" in flags.positional):
                    return ours, same.values.split()
    for instead in INSTEAD:
        if name in instead.names.split() and command in (instead.commands or command).split():
            return instead.answer
    return None


def own_name(name: str, flags: Flags, command: str) -> str:
    """Our flag for one of another trainer, where its value is the same; any other flag as it is."""
    meaning = None if name in flags.takes else translate(name, flags, command)
    return meaning[0] if isinstance(meaning, tuple) and not meaning[1] else name


def answer_to_value(flag: str, value: str) -> str | None:
    """What to use instead of a value that a flag of ours does not take; None if there is nothing to say."""
    for pattern, answer in _VALUES:
        if match := re.fullmatch(pattern, f"{flag}={value}"):
            return answer.format(*match.groups())
    return None
