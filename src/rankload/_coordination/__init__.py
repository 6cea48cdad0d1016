"""The ranks of a job: who they are, how they meet, agree, wait and fail together."""
