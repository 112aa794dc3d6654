"""docs/parity.md, generated from the comparisons of `figures.py`, so that it promises what the tests show.

python -m tests.parity.document
"""

from __future__ import annotations

from pathlib import Path

from pipelines.files import write_atomically
from tests.parity.figures import FIGURES, Figure

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
INTRODUCTION = """# Parity with the authors' code

Whether fastmoco trains what MoCo's users know, in numbers. The loops of the authors' CIFAR demo and ImageNet code, of
lightly and of the evaluation protocols are restated in plain PyTorch
([restated.py](../tests/parity/restated.py)), written anew from the paper and from what they compute, and both train on
the same views from the same weights in float64. The table is generated from the comparisons
([figures.py](../tests/parity/figures.py)), and the tests fail if a difference exceeds its bound, or if it stays within
the bound although a setting differs. The bounds leave room for processors that round differently; what was measured is
usually a hundred times smaller.

    uv run pytest tests/parity

"""
REST = """
Training is compared over six steps with a narrow ResNet-18, momentum SGD, weight decay and EMA. The reference of every
kernel and of every mode is in [test_step_parity.py](../tests/step/test_step_parity.py), several ranks in
[test_distributed_step.py](../tests/distributed/test_distributed_step.py).

## Deliberate differences

1. **Batch norm statistics of several ranks.** Each rank normalises with its own share of the batch, as with
   DistributedDataParallel. The running statistics, which only evaluation uses, are averaged over the ranks;
   DistributedDataParallel keeps those of rank 0.
2. **The first epoch of the schedule.** It is 0, as in the authors' ImageNet code. Their CIFAR demo counts from 1, so
   that its last epoch has a learning rate of 0. The recipes of the demo do the same (`--first-epoch 1`); a run of one
   epoch, which would not learn, counts from 0.
3. **Rounding of views.** Colour operations are computed in float32 and rounded once, where those of PIL truncate to 8
   bits after each operation, which darkens views by about one level of 255. Compared with torchvision's operations on
   PIL images views therefore have the same distribution up to one level, and compared with those on float tensors the
   same values up to rounding.

## What follows from them, and what does not

- **Groups of batch norm.** The demo's split batch norm puts images g, g + 8, g + 16, … of a batch into group g; ours,
  like the shards of ranks, are runs of consecutive images. Batches are in random order, so both are random groups; in
  the comparison the batch is reordered accordingly.
- **The symmetric loss.** The authors draw a permutation for the keys of each direction, and embed the queries of both
  in the order of the batch. Here the queries of the second direction pass the encoder in the order in which the keys of
  the first did, and its keys in the order of the batch: one permutation for both, and still each query is normalised
  with other images than its key. In this order each view is moved once, to the rank that embeds it as query and as
  key; the authors' would exchange images between ranks in every step. Given the groups, loss, gradients and keys are
  the same (second row of the table). The two directions are less independent, so that the logged loss of one step
  scatters more, 1.3 to 1.4 times, about the same mean.
- **First weights.** torchvision's initialisation, but torch's default for the first convolution in the recipes of the
  CIFAR demo (`--stem-init torch`, standard deviation 0.111), because the demo replaces that layer by a new one. Other
  recipes with the 3×3 stem have torchvision's (0.06 at width 1).
- **Solarisation** inverts values from one half on, PIL levels from 128 on: the same for each of the 256 levels. Between
  127.5 and 128, which PIL has truncated to 127, views have a value that is higher by less than one level. One half keeps
  the operation continuous, so that rounding does not decide whether a value is inverted, and pipelines agree.
- **The view of evaluation** at more than 64 pixels is torchvision's `Resize` of the shorter side to 256/224 of the view
  and `CenterCrop`, on every pipeline and in the preprocessing of `load_backbone`. Up to 64 pixels it is the largest
  centred square, which for CIFAR is the image.
- **The linear probe** has the authors' weight decay on weights and biases alike (`--linear-wd`, 0 by default as
  theirs).
- **`num_batches_tracked`.** torch counts batches for a cumulative average, which MoCo does not use; exported
  backbones have the count of steps, as a model trained in torch would.

## Which accuracy is which

An expected accuracy is comparable with a measured one only if both are of the same measurement; `fastmoco recipes NAME`
names it.

| accuracy | measured on | here |
|---|---|---|
| CIFAR demo, 82.6 to 89.7 % | weighted kNN, k 200, T 0.1, on the encoder's 128-d output | `--knn-on output`, `knn_output_top1_percent` |
| kNN in most other projects | the same votes, on the backbone's features | `--knn-on features`, `knn_top1_percent` |
| lightly's tutorial, 73 and 80 % | linear layer on L2-normalised features, SGD without momentum, ImageNet normalisation | `--linear-normalize --linear-momentum 0`, as `fastmoco recipes cifar10-mlp` prints |
| MoCo v1 and v2 on ImageNet | linear layer on features, lr 30, 100 epochs, random resized crops | `--linear-views resized`, as `fastmoco recipes imagenet-v2` prints |

The kNN accuracies of features and of output differ by about two points, either way. Training and `fastmoco eval` print
both; a backbone that was exported without its head has features only, which `eval` says.
"""  # noqa: E501


def document() -> str:
    """The whole page."""
    rows = ["| compared with | in | largest difference |", "|---|---|---|"]
    rows += [f"| {figure.what} | {figure.quantities} | {_bound(figure)} |" for figure in FIGURES]
    return INTRODUCTION + "\n".join(rows) + "\n" + REST


def _bound(figure: Figure) -> str:
    if figure.bound == 0:
        return f"0 {figure.unit}"
    number = f"{figure.bound:.0e}".replace("e-0", "e-") if figure.bound < 0.01 else f"{figure.bound:.2g}"
    return (
        f"at most {number} ({figure.unit})"
        if figure.unit in ("relative", "absolute")
        else f"at most {number} {figure.unit}"
    )


if __name__ == "__main__":
    write_atomically(DOCUMENT, document())
