"""The imports of the compute half leave scipy out, and lose nothing by it."""

import subprocess
import sys

PROGRAM = """
import sys
import engines.machine
import torch
from transformers import BertModel
from transformers.loss.loss_for_object_detection import HungarianMatcher
needless = ("scipy", "sentence_transformers", "pandas", "sklearn", "matplotlib", "ray")
print([name for name in needless if name in sys.modules])
boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]])
outputs = {"logits": torch.zeros(1, 2, 3), "pred_boxes": boxes[None]}
found = HungarianMatcher()(outputs, [{"class_labels": torch.tensor([0, 1]), "boxes": boxes.flip(0)}])
print([side.tolist() for side in found[0]], "scipy" in sys.modules)
"""


def test_the_engines_import_neither_scipy_nor_what_only_training_needs_and_scipy_is_there_when_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)

    assert done.stdout.splitlines() == ["[]", "[[0, 1], [1, 0]] True"], done.stderr
