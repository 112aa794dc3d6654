"""Names of data sets, for those who ask before anything is loaded that takes seconds: torch, torchvision."""

ARRAYS = ("cifar10", "cifar100", "stl10", "mnist", "fashion-mnist", "emnist", "emnist-byclass")
NAMES = (*ARRAYS, "imagenette", "shapes")
