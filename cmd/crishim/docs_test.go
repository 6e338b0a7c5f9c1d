package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/klauspost/compress/zstd"
	"github.com/pelletier/go-toml/v2"

	"crishim/shim/config"
	"crishim/systemd"
	"crishim/test/documents"
)

// The tests here hold the documents to the commands, the configuration and the messages that there are. What the commands do on a node, and what comes
// of them, is for test/e2e, test/engines, test/restore and test/vm.

const repository = "../.."

func readDocuments(t *testing.T) []documents.Page {
	t.Helper()
	all, err := documents.Read(repository)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// checkLine says what is wrong with a command line of crishim's, without the word crishim. In prose some of it may be left out.
func checkLine(words []string, prose bool) error {
	root := rootCommand()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	command, rest, err := root.Find(words)
	if err != nil {
		return err
	}
	command.InitDefaultHelpFlag()
	command.InitDefaultVersionFlag()
	if err := command.ParseFlags(rest); err != nil {
		return err
	}
	args := command.Flags().Args()
	if !command.Runnable() && (!prose || len(args) > 0) {
		return fmt.Errorf("%s is no command by itself, with %q", command.CommandPath(), args)
	}
	if prose {
		return nil
	}
	return errors.Join(command.ValidateArgs(args), command.ValidateRequiredFlags())
}

func TestCommandsInDocuments(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(repository, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	check := func(d documents.Page, line string, prose bool) {
		for _, words := range documents.Commands(line) {
			var err error
			switch words[0] {
			case "crishim":
				seen++
				err = checkLine(words[1:], prose)
			case "make":
				for _, target := range words[1:] {
					named := regexp.MustCompile(`(?m)^(\.PHONY:.* )?` + regexp.QuoteMeta(target) + `\b`)
					if !strings.Contains(target, "=") && !named.Match(makefile) {
						err = errors.Join(err, fmt.Errorf("the Makefile has no target %s", target))
					}
				}
			}
			if err != nil {
				t.Errorf("%s: %s: %v", d.Path, line, err)
			}
		}
	}
	for _, d := range readDocuments(t) {
		for _, b := range d.Blocks {
			for _, line := range b.CommandLines() {
				check(d, line, false)
			}
		}
		said := messages(d)
		for _, span := range d.Spans {
			if !slices.Contains(said, span) {
				check(d, span, true)
			}
		}
	}
	if seen < 50 {
		t.Errorf("%d command lines were found: the documents have more", seen)
	}
}

// TestEachCommandIsRun sees that each command of the documents is typed by test/vm, or is one that a test runs by other means.
func TestEachCommandIsRun(t *testing.T) {
	tests := map[string]bool{}
	files, err := filepath.Glob(filepath.Join(repository, "test/*/*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllStringSubmatch(string(content), -1) {
			tests[match[1]] = true
		}
	}
	for _, d := range readDocuments(t) {
		for _, b := range d.Blocks {
			for _, line := range b.CommandLines() {
				if elsewhere := documents.Elsewhere(line); elsewhere != "" && !tests[elsewhere] {
					t.Errorf("%s: %s: there is no test %s", d.Path, line, elsewhere)
				}
			}
		}
	}
}

// TestWrongCommands sees that the test above can fail.
func TestWrongCommands(t *testing.T) {
	for _, line := range []string{
		"crishim chekpoint default/web/app", "crishim kubelet enabel", "crishim kubelet", "crishim list --form json", "crishim diff before.tar",
		"crishim convert archive.tar image.tar", "crishim verify", "crishim kubelet enable --timeout soon", "# crishim checkpoint a b # for two",
	} {
		if err := checkLine(documents.Commands(line)[0][1:], false); err == nil {
			t.Errorf("%s is taken for right", line)
		}
	}
	for _, line := range []string{"crishim check", "# crishim checkpoint default/web -o /data/web.tar", "crishim list --output json | jq .", "crishim completion bash > FILE"} {
		if err := checkLine(documents.Commands(line)[0][1:], false); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// TestCommandsOnAnArchive runs the commands in docs/forensics.md that need no node, on archives of a real container under the names that they have there.
func TestCommandsOnAnArchive(t *testing.T) {
	dir := t.TempDir()
	for name, from := range map[string]string{"case-1.tar": "before.tar.zst", "case-2.tar": "after.tar.zst"} {
		packed, err := os.ReadFile(realArchive(from))
		if err != nil {
			t.Fatal(err)
		}
		decoder, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		content, err := decoder.DecodeAll(packed, nil)
		decoder.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := map[string]int{}
	for _, d := range readDocuments(t) {
		if d.Path != "docs/forensics.md" {
			continue
		}
		t.Chdir(dir)
		for _, b := range d.Blocks {
			for _, line := range b.CommandLines() {
				line = strings.TrimSpace(strings.ReplaceAll(line, "/var/lib/evidence/", ""))
				if strings.HasPrefix(line, "tar ") {
					run["tar"]++
					if out, err := exec.CommandContext(t.Context(), "sh", "-ec", line).CombinedOutput(); err != nil || len(out) == 0 && strings.Contains(line, "-t") {
						t.Errorf("%s: %v, %s", line, err, out)
					}
					continue
				}
				for _, words := range documents.Commands(line) {
					if words[0] != "crishim" || !slices.Contains([]string{"inspect", "verify", "diff"}, words[1]) {
						continue
					}
					run[words[1]]++
					if out, err := execute(t, words[1:]...); err != nil && !errors.Is(err, errDifferent) || out == "" {
						t.Errorf("%s: %v, %s", line, err, out)
					}
				}
			}
		}
	}
	for _, name := range []string{"rootfs-diff.tar", "container.log", "checkpoint/inventory.img"} {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("the page extracts it: %v", err)
		}
	}
	if run["tar"] < 3 || run["inspect"] < 3 || run["verify"] < 1 || run["diff"] < 1 {
		t.Errorf("of the commands were run %v: the page has more", run)
	}
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func TestLinksInDocuments(t *testing.T) {
	for _, d := range readDocuments(t) {
		for _, match := range link.FindAllStringSubmatch(documents.CodeSpan.ReplaceAllString(d.Prose, "code"), -1) {
			target, fragment, _ := strings.Cut(match[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			path := filepath.Join(repository, d.Path)
			if target != "" {
				path = filepath.Join(repository, filepath.Dir(d.Path), target)
			}
			content, err := os.ReadFile(path)
			if info, statErr := os.Stat(path); statErr != nil || !filepath.IsLocal(filepath.Join(filepath.Dir(d.Path), target)) {
				t.Errorf("%s: the link %s leads nowhere: %v", d.Path, match[1], statErr)
			} else if !info.IsDir() && err != nil {
				t.Error(err)
			}
			if fragment != "" && !slices.Contains(anchors(string(content)), fragment) {
				t.Errorf("%s: the link %s leads to no heading", d.Path, match[1])
			}
		}
	}
}

// anchors are what GitHub makes of the headings of a document.
func anchors(text string) (all []string) {
	for _, line := range strings.Split(documents.Parse("", text).Prose, "\n") {
		heading := strings.TrimLeft(line, "#")
		if heading == line || !strings.HasPrefix(heading, " ") {
			continue
		}
		all = append(all, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(heading)))
	}
	return all
}

// TestEachDocumentIsInTheIndex sees that docs/README.md leads to each page.
func TestEachDocumentIsInTheIndex(t *testing.T) {
	var index string
	all := readDocuments(t)
	for _, d := range all {
		if d.Path == "docs/README.md" {
			index = d.Text
		}
	}
	for _, d := range all {
		path, inDocs := strings.CutPrefix(d.Path, "docs/")
		if inDocs && path != "README.md" && !strings.Contains(index, "]("+path+")") {
			t.Errorf("docs/README.md does not lead to %s", path)
		}
	}
}

var (
	keyOfTable = regexp.MustCompile(`^(checkpoint|retention|shutdown|tracing)\.([a-z_]+)( = .*)?$`)
	keyWithout = regexp.MustCompile(`^([a-z_]+) = `)
	variable   = regexp.MustCompile(`\bCRISHIM_[A-Z_]+\b`)
)

func TestKeysInDocuments(t *testing.T) {
	// The tests of shim/config hold this file to what there is.
	var shipped map[string]any
	if err := toml.Unmarshal([]byte(systemd.Config), &shipped); err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for name, value := range shipped {
		if table, ok := value.(map[string]any); ok {
			for key := range table {
				known[name+"."+key] = true
			}
		} else {
			known[name] = true
		}
	}
	variables := []string{"CRISHIM_TEST_CACHE"} // which is for the tests
	for name := range known {
		variables = append(variables, "CRISHIM_"+strings.ToUpper(strings.ReplaceAll(name, ".", "_")))
	}
	seen := 0
	for _, d := range readDocuments(t) {
		for _, span := range d.Spans {
			name := ""
			if match := keyOfTable.FindStringSubmatch(span); match != nil && match[2] != "tar" {
				name = match[1] + "." + match[2]
			} else if match := keyWithout.FindStringSubmatch(span); match != nil {
				name = match[1]
			}
			if name == "" {
				continue
			}
			seen++
			if !known[name] {
				t.Errorf("%s: there is no key %s", d.Path, name)
			}
		}
		for _, name := range variable.FindAllString(d.Text, -1) {
			if !slices.Contains(variables, name) {
				t.Errorf("%s: there is no variable %s", d.Path, name)
			}
		}
		for _, b := range d.Blocks {
			if b.Language != "toml" {
				continue
			}
			text := strings.Join(b.Lines, "\n")
			keys := config.Defaults()
			if err := toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(&keys); err != nil {
				t.Errorf("%s: %v in\n%s", d.Path, err, text)
			}
			if os.Geteuid() != 0 {
				continue // the values of a file are looked at only if it is root's
			}
			file := filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := (config.Sources{File: file}).Load(); err != nil {
				t.Errorf("%s: %v in\n%s", d.Path, err, text)
			}
		}
	}
	if seen < 20 {
		t.Errorf("%d keys were found: the documents have more", seen)
	}
}

var messageRow = regexp.MustCompile("(?m)^\\| `([^`\n]+)` \\|")

// messages are what is in the first column of the tables in docs/troubleshooting.md.
func messages(d documents.Page) (all []string) {
	if d.Path == "docs/troubleshooting.md" {
		for _, match := range messageRow.FindAllStringSubmatch(d.Text, -1) {
			all = append(all, match[1])
		}
	}
	return all
}

// TestMessagesInTroubleshooting sees that each message has words that are in the source, between two … in one line of it.
func TestMessagesInTroubleshooting(t *testing.T) {
	var source strings.Builder
	asPrinted := strings.NewReplacer("%%", "%", `\"`, `"`)
	for _, dir := range []string{"cmd", "criu", "shim", "systemd"} {
		err := filepath.WalkDir(filepath.Join(repository, dir), func(path string, _ os.DirEntry, err error) error {
			if ext := filepath.Ext(path); err != nil || ext != ".go" && ext != ".sh" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			content, err := os.ReadFile(path)
			source.WriteString(asPrinted.Replace(string(content)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	for _, d := range readDocuments(t) {
		for _, message := range messages(d) {
			seen++
			for _, words := range strings.Split(message, "…") {
				if words = strings.TrimSpace(words); !strings.Contains(source.String(), words) {
					t.Errorf("no message has the words %q", words)
				}
			}
		}
	}
	if seen < 50 {
		t.Errorf("%d messages were found: there are more", seen)
	}
}
