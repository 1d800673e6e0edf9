"""Entry points: ``python -m jobs.NAME``, in a shell and under ``ray job submit`` alike."""
