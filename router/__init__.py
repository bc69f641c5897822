"""The HTTP edge: who may come in, what was asked, which host answers, and how the answer is written."""
