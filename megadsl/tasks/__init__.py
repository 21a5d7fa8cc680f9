"""What a model learns: a folder a task, each behind the one protocol of task.py. Nothing of a task lies elsewhere."""
