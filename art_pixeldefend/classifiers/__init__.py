"""The paper's image classifiers and their training."""

from art_pixeldefend.classifiers.manifold import ManifoldAdversarialTrainer
from art_pixeldefend.classifiers.networks import NETWORKS, accuracy, as_art, build, load, load_module, names, save
from art_pixeldefend.classifiers.training import ADVERSARIAL, RECIPES, SMOOTHING, TECHNIQUES, Recipe, train
from art_pixeldefend.classifiers.tuning import TUNING, PurifiedTrainer

__all__ = [
    "ADVERSARIAL",
    "NETWORKS",
    "RECIPES",
    "SMOOTHING",
    "TECHNIQUES",
    "TUNING",
    "ManifoldAdversarialTrainer",
    "PurifiedTrainer",
    "Recipe",
    "accuracy",
    "as_art",
    "build",
    "load",
    "load_module",
    "names",
    "save",
    "train",
]
