"""What every folder uses: errors, keyed random numbers, files, the terminal, statistics. Imports nothing of ours."""
