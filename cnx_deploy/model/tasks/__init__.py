"""What a network is for: each task is one file that declares its head, outputs, loss, metrics, gate and answers."""
