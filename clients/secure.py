def secagg_reply(*a):
    raise NotImplementedError
