"""A phone without hardware: the device side of the adb protocol over TCP, with faults on request.

The real adb server connects to it (`adb connect 127.0.0.1:PORT`), so everything above the cable is what phones get. Its
commands run on this machine in a folder of its own; its tools really run models (`tests.virtual_phone.tools`). What is
missing is the hardware, and it says so itself: `ro.boot.qemu` is 1, as on every Android that is not a phone.
"""
