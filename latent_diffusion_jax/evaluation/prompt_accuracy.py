"""Do samples show what their prompts name? A classifier of real images reads them."""

import dataclasses

import numpy as np
from sklearn.svm import SVC


@dataclasses.dataclass(frozen=True)
class Reader:
    """A support vector machine on pixels, fitted on real images.

    Attributes:
      held_out_accuracy: its accuracy on real images that it was not fitted on.
    """

    classifier: SVC
    held_out_accuracy: float

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of samples [N, D] that are read as their label [N]."""
        return float(self.classifier.score(features, labels))


def fit_reader(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> Reader:
    """Fits on features [N, D] in [0, 1] of real images with integer labels [N]."""
    classifier = SVC(C=10.0).fit(features, labels)
    return Reader(classifier, float(classifier.score(test_features, test_labels)))


def balanced_prompts(
    captions: list[list[str]], labels: np.ndarray, num_classes: int, per_class: int
) -> tuple[list[str], np.ndarray]:
    """`per_class` prompts for each label, taken in turn from all wordings of its captions.

    Args:
      captions: each example's captions.
      labels: each example's label [N].
      num_classes: number of labels.
      per_class: prompts for each.

    Returns:
      Prompts and their labels, [num_classes * per_class] each.

    Raises:
      ValueError: a label has no example.
    """
    prompts: list[str] = []
    for label in range(num_classes):
        wordings = list(
            dict.fromkeys(c for i in np.flatnonzero(labels == label) for c in captions[i])
        )
        if not wordings:
            raise ValueError(f"label {label} has no example to take a prompt from")
        prompts += [wordings[i % len(wordings)] for i in range(per_class)]
    return prompts, np.repeat(np.arange(num_classes), per_class)
