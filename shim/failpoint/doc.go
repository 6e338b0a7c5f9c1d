// Package failpoint lets a test stop crishim at a named point of the code, to kill it just there. It does so only in a binary that is
// built with the tag "failpoint"; in all others, and so in what is shipped, a point is a call of an empty function.
package failpoint

// File has the name of the point at which a process is to stop. Only tests write it.
const File = "/run/crishim-failpoint"
