def check_agent(*args, **kwargs):
    raise NotImplementedError
