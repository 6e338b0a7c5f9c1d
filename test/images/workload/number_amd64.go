package main

// sysMemfdCreate is the number of a system call that package syscall lacks on this machine.
const sysMemfdCreate = 319
