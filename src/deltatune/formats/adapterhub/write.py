def write_adapterhub(model, weights, folder):
    raise NotImplementedError
