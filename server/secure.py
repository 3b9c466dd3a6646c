def collect_aggregate(*a):
    raise NotImplementedError
