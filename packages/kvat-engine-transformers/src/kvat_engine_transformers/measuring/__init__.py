"""The heavy half: one loaded model in one worker process."""
