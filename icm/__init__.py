"""A curiosity-driven agent (ICM, Pathak et al. 2017) that explores NES games from pixels."""
