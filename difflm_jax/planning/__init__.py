"""What a job needs: memory, FLOPs and seconds of a step or a generation on a chip, before it is run."""
