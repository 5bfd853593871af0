"""`python -m kernels`: which implementation serves which op on each kind of device."""

from kernels import OPS, implementations

if __name__ == "__main__":
    devices = ("cpu", "cuda", "npu")
    table = {device: implementations(device) for device in devices}
    width = max(map(len, OPS))
    print(f"{'op':{width}}  " + "".join(f"{device:10}" for device in devices))
    for op in OPS:
        print(f"{op:{width}}  " + "".join(f"{next(iter(table[d][op]), '-'):10}" for d in devices))
    print("-: none yet; model.kernels.<op>=native asks for plain torch by name")
