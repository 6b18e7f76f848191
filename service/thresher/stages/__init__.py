"""The stages of a job, one file each: what goes in, what is done, what comes out, from top to bottom."""
