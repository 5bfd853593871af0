"""`python -m kernels`: the default implementation of every op on each kind of device."""

from kernels import OPS, implementations, is_installed

if __name__ == "__main__":
    devices = ("cpu", "cuda", "npu")
    table = {device: implementations(device) for device in devices}
    width = max(map(len, OPS))
    print(f"{'op':{width}}  " + "".join(f"{device:14}" for device in devices))
    for op in OPS:
        first = (table[device][op][0] for device in devices)
        print(f"{op:{width}}  " + "".join(f"{name if is_installed(name) else name + ' -':14}" for name in first))
    print(
        "-: not installed here. Set model.kernels.<op> to auto (this table) or to an implementation; native is plain torch"
    )
