"""placeholder"""
def evaluate(model, loader): raise NotImplementedError
