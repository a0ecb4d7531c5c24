"""Arms trained from embedded bases on embedded tasks, in resumable runs, and what is read off their results."""
