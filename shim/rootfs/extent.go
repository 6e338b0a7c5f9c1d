package rootfs

// maxFileSize is the longest file that is taken: ext4 has no longer ones.
const maxFileSize = 16 << 40

// extent is a part of a file.
type extent struct{ offset, length int64 }
