def bench(args, peaks):
    return []


def ratios(rows):
    return []
