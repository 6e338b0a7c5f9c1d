// Package documents reads what this project says of itself, for the tests that hold it to what there is, and that run its commands.
package documents

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Page is a document that people read.
type Page struct {
	Path   string // from the top of the tree
	Text   string
	Blocks []Block  // of code
	Prose  string   // all that is not in such a block
	Spans  []string // of code, in the prose
}

// Block is a block of code.
type Block struct {
	Language string
	Lines    []string
}

// Read reads README.md, SECURITY.md and what is in docs, of a tree or of an installed package.
func Read(top string) ([]Page, error) {
	paths := []string{filepath.Join(top, "README.md"), filepath.Join(top, "SECURITY.md")}
	for _, pattern := range []string{"docs/*.md", "docs/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil || len(found) == 0 {
			return nil, fmt.Errorf("read documents: no %s in %s", pattern, top)
		}
		paths = append(paths, found...)
	}
	var all []Page
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read documents: %w", err)
		}
		relative, err := filepath.Rel(top, path)
		if err != nil {
			return nil, fmt.Errorf("read documents: %w", err)
		}
		all = append(all, Parse(relative, string(content)))
	}
	return all, nil
}

// CodeSpan is code in the prose.
var CodeSpan = regexp.MustCompile("`([^`\n]+)`")

// Parse tells blocks of code, fenced or indented, from prose. Code in lists has none here, and is taken for prose.
func Parse(path, text string) Page {
	p := Page{Path: path, Text: text}
	var prose strings.Builder
	fenced, before := false, "" // the line before, as an indented block begins behind an empty one
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		fence, isFence := strings.CutPrefix(line, "```")
		code, indented := strings.CutPrefix(line, "    ")
		inBlock := strings.HasPrefix(before, "    ")
		switch {
		case isFence:
			if fenced = !fenced; fenced {
				p.Blocks = append(p.Blocks, Block{Language: fence})
			}
			line = ""
		case fenced:
			last := &p.Blocks[len(p.Blocks)-1]
			last.Lines = append(last.Lines, line)
			line = ""
		case indented && (inBlock || before == ""):
			if !inBlock {
				p.Blocks = append(p.Blocks, Block{})
			}
			last := &p.Blocks[len(p.Blocks)-1]
			last.Lines = append(last.Lines, code)
		default:
			prose.WriteString(line)
		}
		prose.WriteByte('\n')
		before = line
	}
	p.Prose = prose.String()
	for _, match := range CodeSpan.FindAllStringSubmatch(p.Prose, -1) {
		p.Spans = append(p.Spans, match[1])
	}
	return p
}

// CommandLines are the lines of a block, with those that a backslash divides put together.
func (b Block) CommandLines() []string {
	return strings.Split(strings.ReplaceAll(strings.Join(b.Lines, "\n"), "\\\n", " "), "\n")
}

// Commands are the commands of a line of shell, each as its words. It knows root's prompt, pipes, lists, comments and redirections, and the
// brackets of a synopsis; quotes only stay where they are.
func Commands(line string) (commands [][]string) {
	if command, ok := strings.CutPrefix(line, "# "); ok && strings.HasPrefix(command, "crishim ") {
		line = command // root's prompt, and no comment
	}
	var words []string
	end := func() {
		if len(words) > 0 {
			commands = append(commands, words)
		}
		words = nil
	}
	fields := strings.Fields(line)
	for i := 0; i < len(fields); i++ {
		switch word := fields[i]; {
		case word == "#":
			i = len(fields)
		case word == "|", word == "&&", word == "||", word == ";", word == "&":
			end()
		case word == ">", word == "<", word == ">>", word == "2>":
			i++ // and what it leads to
		default:
			words = append(words, strings.Trim(word, "[]"))
		}
	}
	end()
	return commands
}

// Programs are those whose lines in a block are commands. Other lines are what they print, or no shell.
var Programs = []string{
	"apt", "checkpointctl", "crishim", "ctr", "curl", "install", "journalctl", "make", "mkdir", "podman", "runc", "systemctl", "tar",
}

// Elsewhere names the test that runs what a command line of the documents does by other means than to type it, empty if it is to be typed:
// test/vm does that, on a node on which the package is installed.
func Elsewhere(line string) (test string) {
	for _, known := range []struct{ begin, test string }{
		{"apt ", "TestPackage"}, // without the questions
		{"checkpointctl ", "TestCompressedArchive"},
		{"crishim cancel ", "TestAnOperatorsCommands"}, // with a checkpoint that is held
		{"crishim serve ", "TestCheckpointThroughAKubelet"},
		{"ctr -n k8s.io images pull ", "TestCheckpointThroughAKubelet"}, // this and what follows is test/restore
		{"curl ", "TestCheckpointThroughAKubelet"},
		{"make ", "TestRelease"}, // packages; the others are what is run to test
		{"mkdir -p restored/", "TestCheckpointThroughAKubelet"},
		{"podman ", "TestPodman"},
		{"runc restore ", "TestCheckpointThroughAKubelet"},
		{"tar --extract --same-permissions ", "TestCheckpointThroughAKubelet"},
	} {
		if strings.HasPrefix(line, known.begin) {
			return known.test
		}
	}
	return ""
}
