"""The loop and everything around it: workbench, trials, waves, finalists, run folder."""
