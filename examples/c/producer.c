/* A serving stack in C that joins tided by speaking docs/protocol.md: no library but libc and pthread.
 *
 *   cc -std=c11 -O2 -Wall -Wextra -Werror -pthread -o producer producer.c wire.c
 *   ./producer unix:/run/valkey.sock mine TARGET_DIGEST LAYERS HIDDEN VOCAB LOW MIDDLE HIGH
 *
 * The step loop stands for a model: requests arrive by themselves, every token follows from the one before it, and each value of a
 * token's hidden states is its id. It taps what it computes, drafts as many tokens as the schedule says, accepts some, and holds the
 * draft that was swapped in. It never waits for the network: a second thread, the link, does all the talking, and when no chunk is
 * free the step loop sheds rows and counts them. SIGTERM ends it in order, with its totals on standard output.
 */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum {
    STATES = 3, MAX_BATCH = 4, GAMMA_MAX = 4, PROMPT = 5, OUTPUT = 12, /* tokens */
    SLOTS = 8, ROWS = 256, MENTIONS = 64, FINISHED = 256, REMEMBERED = 256, MAX_GAMMAS = 64
};

typedef struct { char name[24]; int prompt, tokens, rows, tapped, private; int spec_steps, drafted, accepted; } Request;
typedef struct { char request[24]; int prompt; unsigned char group[16]; } Ref;
typedef struct { int request, position, rows; } Segment;
typedef struct { int request, aborted; int32_t tail; } End;

typedef struct { /* one chunk, being filled or on its way out */
    int rows, requests, segments, ends;
    double opened_s;
    int32_t ids[ROWS];
    Ref request[MENTIONS];
    Segment segment[MENTIONS * 4];
    End end[MENTIONS];
    uint16_t *states; /* [ROWS, STATES, hidden], bfloat16 */
} Slot;

typedef struct { long long steps; double seconds; long long accepted[GAMMA_MAX + 1]; } Count;
typedef struct { int prompt, output, spec_steps, drafted, accepted; } Stats;
typedef struct { char id[65]; int ok; char error[160], version[65]; double seconds; } Answer;

static const char *engine, *target;
static char incarnation[64];
static int layers, hidden, vocab, aux[STATES];
static volatile sig_atomic_t stopping;

/* Shared by both threads, under `lock`. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Slot slots[SLOTS];
static Slot *open_slot, *ready[SLOTS], *free_slots[SLOTS];
static int n_ready, n_free, capturing, running, drained;
static long long credit_bytes, tapped, sent, shed, skipped;
static int gammas[MAX_GAMMAS] = {0}, n_gammas = 1;
static char version[65] = "", vocab_id[65] = "";
static Count counts[MAX_BATCH + 1][GAMMA_MAX + 1];
static Stats finished[FINISHED];
static int n_finished;

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void sleep_ms(long ms) { nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL); }

/* ---- the tap: called by the step loop, never waits for anything but a lock that is held for microseconds ---- */

static void hand_over(void) {
    if (open_slot && (open_slot->rows || open_slot->ends)) {
        ready[n_ready++] = open_slot;
        open_slot = NULL;
    }
}

static Slot *room(void) {
    Slot *slot = open_slot;
    if (slot && (slot->rows == ROWS || slot->requests == MENTIONS || slot->segments == MENTIONS * 4 || slot->ends == MENTIONS)) {
        hand_over();
        slot = NULL;
    }
    if (!slot) {
        if (!n_free) return NULL;
        slot = open_slot = free_slots[--n_free];
        slot->rows = slot->requests = slot->segments = slot->ends = 0;
        slot->opened_s = now_s();
    }
    return slot;
}

static int32_t token_of(const char *name, int position) {
    size_t n = strlen(name);
    long seed = ((long)name[n - 3] << 16) + ((long)name[n - 2] << 8) + name[n - 1];
    return (int32_t)((seed + 7L * position) % 251);
}

static int mention(Slot *slot, const Request *request) {
    for (int i = 0; i < slot->requests; i++)
        if (!strcmp(slot->request[i].request, request->name)) return i;
    Ref *ref = &slot->request[slot->requests];
    unsigned char ids[4 * PROMPT], digest[32];
    for (int i = 0; i < PROMPT; i++) put_le32(ids + 4 * i, (uint32_t)token_of(request->name, i));
    sha256(digest, 1, (const void *[]){ids}, (size_t[]){sizeof ids});
    memcpy(ref->group, digest, 16);
    strcpy(ref->request, request->name);
    ref->prompt = request->prompt;
    return slot->requests++;
}

static void record(const Request *request, int rows) {
    if (!request->tapped) return;
    pthread_mutex_lock(&lock);
    if (request->private) skipped += rows;
    for (int i = 0; i < rows && !request->private; i++) {
        int position = request->rows + i;
        Slot *slot = room();
        tapped++;
        if (!slot) { shed++; continue; }
        int index = mention(slot, request);
        Segment *last = slot->segments ? &slot->segment[slot->segments - 1] : NULL;
        if (last && last->request == index && last->position + last->rows == position) last->rows++;
        else slot->segment[slot->segments++] = (Segment){index, position, 1};
        int32_t token = slot->ids[slot->rows] = token_of(request->name, position);
        float value = (float)token;
        uint32_t bits;
        memcpy(&bits, &value, 4);
        for (int k = 0; k < STATES * hidden; k++) slot->states[(size_t)slot->rows * STATES * hidden + k] = (uint16_t)(bits >> 16);
        slot->rows++;
    }
    pthread_mutex_unlock(&lock);
}

static void end(const Request *request, int aborted) {
    pthread_mutex_lock(&lock);
    Slot *slot = request->tapped && !request->private ? room() : NULL;
    if (slot) slot->end[slot->ends++] = (End){mention(slot, request), aborted, token_of(request->name, request->rows)};
    if (n_finished < FINISHED)
        finished[n_finished++] = (Stats){request->prompt, request->tokens - request->prompt, request->spec_steps, request->drafted, request->accepted};
    pthread_mutex_unlock(&lock);
}

/* ---- the step loop ---- */

static void step(Request *batch, int n, long number) {
    double started = now_s();
    pthread_mutex_lock(&lock);
    int gamma = gammas[(n < n_gammas ? n : n_gammas) - 1];
    pthread_mutex_unlock(&lock);
    int histogram[GAMMA_MAX + 1] = {0};
    for (int i = 0; i < n; i++) {
        Request *request = &batch[i];
        int right = (int)((number + i) % (gamma + 1)), limit = PROMPT + OUTPUT;
        int kept = right + 1 < limit - request->tokens ? right + 1 : limit - request->tokens;
        histogram[right]++;
        record(request, kept); /* the rows of the newest token and of the accepted drafts but the last */
        request->rows += kept;
        request->tokens += kept;
        request->spec_steps += gamma > 0;
        request->drafted += gamma;
        request->accepted += right;
    }
    sleep_ms(5); /* the model's arithmetic */
    pthread_mutex_lock(&lock);
    Count *count = &counts[n][gamma];
    count->steps++;
    count->seconds += now_s() - started;
    for (int k = 0; k <= gamma; k++) count->accepted[k] += histogram[k];
    pthread_mutex_unlock(&lock);
}

static void serve(void) {
    Request batch[MAX_BATCH];
    int n = 0;
    long started = 0;
    for (long number = 0; !stopping || n; number++) {
        while (n < MAX_BATCH && !stopping) {
            Request *request = &batch[n++];
            *request = (Request){.prompt = PROMPT, .tokens = PROMPT + 1, .private = started % 10 == 9};
            snprintf(request->name, sizeof request->name, "c-%08ld", started++);
            pthread_mutex_lock(&lock);
            request->tapped = capturing; /* only requests that begin while capture is on */
            running = n;
            pthread_mutex_unlock(&lock);
            record(request, PROMPT); /* the prefill's rows */
            request->rows = PROMPT;
        }
        step(batch, n, number);
        for (int i = n - 1; i >= 0; i--) {
            int aborted = number % 97 == 0 && i == 0;
            if (batch[i].tokens < PROMPT + OUTPUT && !aborted) continue;
            end(&batch[i], aborted);
            batch[i] = batch[--n];
        }
        pthread_mutex_lock(&lock);
        running = n;
        if (open_slot && (stopping || now_s() - open_slot->opened_s > 0.2)) hand_over();
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_lock(&lock);
    hand_over();
    drained = 1;
    pthread_mutex_unlock(&lock);
}

/* ---- the link: everything that waits for Redis ---- */

static Redis redis = {.fd = -1};
static char cursor[64];
static long long epoch, seq, report_seq;
static Answer answers[REMEMBERED];
static int n_answers;

static const char *key(const char *what) {
    static char text[4][128];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(text[turn], sizeof text[turn], "tided:{%s}:%s", engine, what);
    return text[turn];
}

static void pack_totals(Pack *p, long long t, long long s, long long d, long long k) {
    pack_map(p, 5);
    pack_str(p, "tapped"), pack_int(p, t);
    pack_str(p, "sent"), pack_int(p, s);
    pack_str(p, "shed"), pack_int(p, d);
    pack_str(p, "ring"), pack_int(p, t - s - d);
    pack_str(p, "skipped"), pack_int(p, k);
}

static void pack_header(Pack *p, const Slot *slot, const void *payload, size_t bytes) {
    unsigned char ids[4 * ROWS];
    int rows = slot ? slot->rows : 0;
    for (int i = 0; i < rows; i++) put_le32(ids + 4 * i, (uint32_t)slot->ids[i]);
    pack_map(p, 18);
    pack_str(p, "v"), pack_int(p, 1);
    pack_str(p, "engine"), pack_str(p, engine);
    pack_str(p, "incarnation"), pack_str(p, incarnation);
    pack_str(p, "seq"), pack_int(p, seq);
    pack_str(p, "target"), pack_str(p, target);
    pack_str(p, "dtype"), pack_str(p, "bfloat16");
    pack_str(p, "rows"), pack_int(p, rows);
    pack_str(p, "states"), pack_int(p, STATES);
    pack_str(p, "hidden"), pack_int(p, hidden);
    pack_str(p, "has_last"), pack_bool(p, 0);
    pack_str(p, "ids"), pack_bin(p, ids, (size_t)rows * 4);
    pack_str(p, "requests"), pack_array(p, slot ? slot->requests : 0);
    for (int i = 0; slot && i < slot->requests; i++) {
        pack_map(p, 3);
        pack_str(p, "request"), pack_str(p, slot->request[i].request);
        pack_str(p, "prompt_tokens"), pack_int(p, slot->request[i].prompt);
        pack_str(p, "group"), pack_bin(p, slot->request[i].group, 16);
    }
    pack_str(p, "segments"), pack_array(p, slot ? slot->segments : 0);
    for (int i = 0; slot && i < slot->segments; i++) {
        pack_map(p, 3);
        pack_str(p, "request"), pack_int(p, slot->segment[i].request);
        pack_str(p, "position"), pack_int(p, slot->segment[i].position);
        pack_str(p, "rows"), pack_int(p, slot->segment[i].rows);
    }
    pack_str(p, "ends"), pack_array(p, slot ? slot->ends : 0);
    for (int i = 0; slot && i < slot->ends; i++) {
        pack_map(p, 3);
        pack_str(p, "request"), pack_int(p, slot->end[i].request);
        pack_str(p, "finish"), pack_str(p, slot->end[i].aborted ? "abort" : "length");
        pack_str(p, "tail"), pack_array(p, 1), pack_int(p, slot->end[i].tail);
    }
    pthread_mutex_lock(&lock);
    pack_str(p, "totals"), pack_totals(p, tapped, sent, shed, skipped);
    pthread_mutex_unlock(&lock);
    pack_str(p, "payload_bytes"), pack_int(p, (long long)bytes);
    pack_str(p, "crc32"), pack_int(p, (long long)crc32_of(payload, bytes));
    pack_str(p, "at_ms"), pack_int(p, (long long)time(NULL) * 1000);
}

/* MULTI, XADD, INCRBY, EXEC. 1: sent; 0: no credit now; -1: the connection broke, its fate is unknown: send it again as it is. */
static int send_chunk(const Pack *header, const void *payload, size_t bytes) {
    char size[32];
    snprintf(size, sizeof size, "%zu", header->n + bytes);
    pthread_mutex_lock(&lock);
    long long most = credit_bytes;
    pthread_mutex_unlock(&lock);
    Value *used = redis_call(&redis, 2, ARGS("GET", key("credit")));
    if (!used) return -1;
    long long waiting = used->text ? atoll(used->text) : 0;
    if (waiting > 0 && waiting + (long long)(header->n + bytes) > most) return 0;
    if (!redis_call(&redis, 1, ARGS("MULTI"))) return -1;
    const char *args[] = {"XADD", key("samples"), "*", "h", (const char *)header->data, "p", payload};
    size_t lengths[] = {4, strlen(args[1]), 1, 1, header->n, 1, bytes};
    if (!redis_call_n(&redis, 7, args, lengths)) return -1;
    if (!redis_call(&redis, 3, ARGS("INCRBY", key("credit"), size))) return -1;
    Value *done = redis_call(&redis, 1, ARGS("EXEC"));
    if (!done) return -1;
    return done->kind == '*' && done->n == 2 && done->items[0]->kind == '$' ? 1 : 0;
}

static int append(const char *stream, const Pack *message, const char *kept) {
    const char *args[] = {"XADD", stream, "MAXLEN", "~", kept, "*", "m", (const char *)message->data};
    size_t lengths[] = {4, strlen(stream), 6, 1, strlen(kept), 1, 1, message->n};
    return redis_call_n(&redis, 8, args, lengths) && redis_call(&redis, 3, ARGS("EXPIRE", stream, "3600"));
}

static int heartbeat(void) {
    Pack p = {0};
    pthread_mutex_lock(&lock);
    pack_map(&p, 16);
    pack_str(&p, "v"), pack_int(&p, 1);
    pack_str(&p, "engine"), pack_str(&p, engine);
    pack_str(&p, "incarnation"), pack_str(&p, incarnation);
    pack_str(&p, "kind"), pack_str(&p, "redis");
    pack_str(&p, "url"), pack_str(&p, "");
    pack_str(&p, "target"), pack_map(&p, 6);
    pack_str(&p, "digest"), pack_str(&p, target);
    pack_str(&p, "name"), pack_str(&p, "toy");
    pack_str(&p, "layers"), pack_int(&p, layers);
    pack_str(&p, "hidden"), pack_int(&p, hidden);
    pack_str(&p, "vocab"), pack_int(&p, vocab);
    pack_str(&p, "aux_layers"), pack_array(&p, STATES);
    for (int i = 0; i < STATES; i++) pack_int(&p, aux[i]);
    pack_str(&p, "version"), pack_str(&p, version);
    pack_str(&p, "vocab_id"), pack_str(&p, vocab_id);
    pack_str(&p, "gamma_max"), pack_int(&p, GAMMA_MAX);
    pack_str(&p, "max_batch"), pack_int(&p, MAX_BATCH);
    pack_str(&p, "capabilities"), pack_array(&p, 3);
    pack_str(&p, "tap"), pack_str(&p, "schedule"), pack_str(&p, "swap");
    pack_str(&p, "gammas"), pack_array(&p, n_gammas);
    for (int i = 0; i < n_gammas; i++) pack_int(&p, gammas[i]);
    pack_str(&p, "capturing"), pack_bool(&p, capturing);
    pack_str(&p, "epoch"), pack_int(&p, epoch);
    pack_str(&p, "profile"), pack_nil(&p);
    pack_str(&p, "pid"), pack_int(&p, getpid());
    pthread_mutex_unlock(&lock);
    const char *args[] = {"SET", key("info"), (const char *)p.data, "EX", "10"};
    size_t lengths[] = {3, strlen(args[1]), p.n, 2, 2};
    int ok = redis_call_n(&redis, 5, args, lengths) != NULL;
    free(p.data);
    return ok;
}

static int report(void) {
    Pack p = {0};
    Value *clock = redis_call(&redis, 1, ARGS("TIME"));
    if (!clock || clock->n != 2) return 0;
    pthread_mutex_lock(&lock);
    int n = 0;
    for (int b = 1; b <= MAX_BATCH; b++)
        for (int g = 0; g <= GAMMA_MAX; g++) n += counts[b][g].steps > 0;
    pack_map(&p, 11);
    pack_str(&p, "v"), pack_int(&p, 1);
    pack_str(&p, "engine"), pack_str(&p, engine);
    pack_str(&p, "incarnation"), pack_str(&p, incarnation);
    pack_str(&p, "seq"), pack_int(&p, ++report_seq);
    pack_str(&p, "at_ms"), pack_int(&p, atoll(clock->items[0]->text) * 1000 + atoll(clock->items[1]->text) / 1000);
    pack_str(&p, "version"), pack_str(&p, version);
    pack_str(&p, "running"), pack_int(&p, running);
    pack_str(&p, "waiting"), pack_int(&p, 0);
    pack_str(&p, "steps"), pack_array(&p, n);
    for (int b = 1; b <= MAX_BATCH; b++)
        for (int g = 0; g <= GAMMA_MAX; g++) {
            Count *count = &counts[b][g];
            if (!count->steps) continue;
            pack_map(&p, 5);
            pack_str(&p, "batch"), pack_int(&p, b);
            pack_str(&p, "gamma"), pack_int(&p, g);
            pack_str(&p, "steps"), pack_int(&p, count->steps);
            pack_str(&p, "seconds"), pack_double(&p, count->seconds);
            pack_str(&p, "accepted"), pack_array(&p, g + 1);
            for (int k = 0; k <= g; k++) pack_int(&p, count->accepted[k]);
        }
    pack_str(&p, "requests"), pack_array(&p, n_finished);
    for (int i = 0; i < n_finished; i++) {
        pack_map(&p, 6);
        pack_str(&p, "prompt_tokens"), pack_int(&p, finished[i].prompt);
        pack_str(&p, "output_tokens"), pack_int(&p, finished[i].output);
        pack_str(&p, "spec_steps"), pack_int(&p, finished[i].spec_steps);
        pack_str(&p, "drafted"), pack_int(&p, finished[i].drafted);
        pack_str(&p, "accepted"), pack_int(&p, finished[i].accepted);
        pack_str(&p, "version"), pack_str(&p, version);
    }
    pack_str(&p, "tap"), pack_totals(&p, tapped, sent, shed, skipped);
    memset(counts, 0, sizeof counts); /* a report whose delivery is unknown is dropped, never repeated */
    n_finished = 0;
    pthread_mutex_unlock(&lock);
    int ok = append(key("observations"), &p, "7200");
    free(p.data);
    return ok;
}

/* ---- commands ---- */

static void refuse(Answer *answer, const char *why) {
    answer->ok = 0;
    snprintf(answer->error, sizeof answer->error, "%s", why);
}

static void apply_schedule(Answer *answer, const Item *body) {
    const Item *list = map_get(body, "gammas");
    if (!list || body->n != 1 || list->kind != 'a' || list->n < 1 || list->n > MAX_GAMMAS) { refuse(answer, "malformed schedule"); return; }
    for (int i = 0; i < list->n; i++)
        if (list->items[i].kind != 'i' || list->items[i].integer < 0 || list->items[i].integer > GAMMA_MAX) {
            refuse(answer, "gammas must be whole numbers in 0..4");
            return;
        }
    pthread_mutex_lock(&lock);
    n_gammas = list->n;
    for (int i = 0; i < n_gammas; i++) gammas[i] = (int)list->items[i].integer;
    pthread_mutex_unlock(&lock);
}

static void apply_capture(Answer *answer, const Item *body) {
    const Item *on = map_get(body, "on"), *bytes = map_get(body, "credit_bytes");
    if (!on || !bytes || body->n != 2 || on->kind != 'b' || bytes->kind != 'i') { refuse(answer, "malformed capture"); return; }
    pthread_mutex_lock(&lock);
    capturing = (int)on->integer;
    credit_bytes = bytes->integer;
    pthread_mutex_unlock(&lock);
}

/* Loads the checkpoint beside the draft that serves, and exchanges them only when its content is what was asked for. */
static void apply_swap(Answer *answer, const Item *body) {
    const Item *wanted = map_get(body, "version"), *path = map_get(body, "path");
    if (!wanted || !path || body->n != 2 || wanted->kind != 's' || path->kind != 's') { refuse(answer, "malformed swap"); return; }
    char found[65], map[65];
    if (!draft_identity(path->text, found, map)) { refuse(answer, "the directory holds no draft"); return; }
    if (strcmp(found, wanted->text)) { refuse(answer, "the directory holds another version; nothing was changed"); return; }
    double started = now_s();
    pthread_mutex_lock(&lock); /* between two steps */
    int same = !vocab_id[0] || !strcmp(vocab_id, map);
    if (same) strcpy(version, found), strcpy(vocab_id, map);
    pthread_mutex_unlock(&lock);
    if (!same) { refuse(answer, "another vocabulary map, which this stack cannot swap"); return; }
    strcpy(answer->version, found);
    answer->seconds = now_s() - started;
}

static void apply(Answer *answer, const Item *command) {
    const Item *kind = map_get(command, "kind"), *body = map_get(command, "body");
    const Item *from = map_get(command, "epoch"), *until = map_get(command, "expires_ms");
    if (from->integer < epoch) { refuse(answer, "the epoch is over"); return; }
    epoch = from->integer;
    Value *clock = redis_call(&redis, 1, ARGS("TIME"));
    if (!clock || clock->n != 2) { refuse(answer, "the time is not known"); return; }
    if (atoll(clock->items[0]->text) * 1000 + atoll(clock->items[1]->text) / 1000 > until->integer) { refuse(answer, "the command expired before it was read"); return; }
    answer->ok = 1;
    if (!strcmp(kind->text, "schedule")) apply_schedule(answer, body);
    else if (!strcmp(kind->text, "capture")) apply_capture(answer, body);
    else if (!strcmp(kind->text, "swap")) apply_swap(answer, body);
    else refuse(answer, "this stack does not know this command");
}

static int reply(const Answer *answer) {
    Pack p = {0};
    pack_map(&p, 6);
    pack_str(&p, "v"), pack_int(&p, 1);
    pack_str(&p, "command"), pack_str(&p, answer->id);
    pack_str(&p, "epoch"), pack_int(&p, epoch);
    pack_str(&p, "ok"), pack_bool(&p, answer->ok);
    pack_str(&p, "error"), pack_str(&p, answer->error);
    pack_str(&p, "data"), pack_map(&p, answer->version[0] ? 2 : 0);
    if (answer->version[0]) {
        pack_str(&p, "version"), pack_str(&p, answer->version);
        pack_str(&p, "seconds"), pack_double(&p, answer->seconds);
    }
    int ok = append(key("replies"), &p, "1000");
    free(p.data);
    return ok;
}

static int obey(const char *data, size_t length) {
    Item *command = unpack(data, length);
    const Item *v = command ? map_get(command, "v") : NULL, *id = command ? map_get(command, "id") : NULL;
    const char *fields[] = {"epoch", "expires_ms", "kind", "body"}, kinds[] = {'i', 'i', 's', 'm'};
    int known = command && command->n == 6 && v && v->kind == 'i' && v->integer == 1 && id && id->kind == 's' && strlen(id->text) < sizeof answers->id;
    for (int i = 0; i < 4 && known; i++) {
        const Item *field = map_get(command, fields[i]);
        known = field && field->kind == kinds[i];
    }
    int ok = 1;
    if (known) { /* what is not understood is not answered: there is no id to trust */
        Answer *answer = NULL;
        for (int i = 0; i < n_answers && i < REMEMBERED; i++)
            if (!strcmp(answers[i].id, id->text)) answer = &answers[i];
        if (!answer) {
            answer = &answers[n_answers++ % REMEMBERED];
            *answer = (Answer){0};
            strcpy(answer->id, id->text);
            apply(answer, command);
            ok = heartbeat(); /* before the reply, so that the two agree */
        }
        ok = ok && reply(answer);
    }
    item_free(command);
    return ok;
}

static int read_commands(void) {
    Value *found = redis_call(&redis, 6, ARGS("XREAD", "COUNT", "16", "STREAMS", key("commands"), cursor));
    if (!found) return 0;
    if (found->kind != '*' || found->n < 1) return 1;
    Value *entries = value_keep(&redis, found)->items[0]->items[1]; /* kept while we make other calls */
    int ok = 1;
    for (int i = 0; i < entries->n && ok; i++) {
        Value *entry = entries->items[i], *fields = entry->items[1];
        snprintf(cursor, sizeof cursor, "%s", entry->items[0]->text);
        for (int k = 0; k + 1 < fields->n; k += 2)
            if (!strcmp(fields->items[k]->text, "m")) ok = obey(fields->items[k + 1]->text, (size_t)fields->items[k + 1]->n);
    }
    value_free(found);
    return ok;
}

static int hello(void) {
    if (!cursor[0]) { /* before the first heartbeat, so that no command that follows it can be missed */
        Value *newest = redis_call(&redis, 6, ARGS("XREVRANGE", key("commands"), "+", "-", "COUNT", "1"));
        if (!newest) return 0;
        snprintf(cursor, sizeof cursor, "%s", newest->n == 1 ? newest->items[0]->items[0]->text : "0-0");
        Value *fields = newest->n == 1 ? newest->items[0]->items[1] : NULL;
        Item *command = fields && fields->n == 2 ? unpack(fields->items[1]->text, (size_t)fields->items[1]->n) : NULL;
        const Item *from = command ? map_get(command, "epoch") : NULL;
        if (from && from->kind == 'i') epoch = from->integer; /* an older leader is superseded, though we were away */
        item_free(command);
    }
    return 1;
}

static void *link_loop(void *address) {
    Slot *slot = NULL;
    Pack header = {0};
    int pending = 0; /* a header that waits to be sent, with its slot if it has rows */
    long long told = 0;
    double beat = 0, told_s = 0, give_up = 0;
    for (;;) {
        pthread_mutex_lock(&lock);
        int over = drained && !n_ready && !pending && shed + skipped == told;
        if (drained && !give_up) give_up = now_s() + 5;
        pthread_mutex_unlock(&lock);
        if (over || (give_up && now_s() > give_up)) break;
        if (redis.fd < 0 && (!redis_connect(&redis, address) || !hello())) {
            redis_close(&redis);
            sleep_ms(200);
            continue;
        }
        int alive = 1, busy = 0;
        if (now_s() >= beat) alive = heartbeat(), beat = now_s() + 1;
        if (alive && now_s() >= told_s) alive = report(), told_s = now_s() + 0.5;
        if (alive) alive = read_commands();
        pthread_mutex_lock(&lock);
        if (!pending && n_ready) {
            slot = ready[0];
            memmove(ready, ready + 1, (size_t)--n_ready * sizeof *ready);
            pending = 1;
        } else if (!pending && !open_slot && shed + skipped != told) pending = 1; /* totals alone */
        pthread_mutex_unlock(&lock);
        size_t bytes = slot ? (size_t)slot->rows * STATES * (size_t)hidden * 2 : 0;
        const void *payload = slot ? (const void *)slot->states : "";
        if (alive && pending && !header.n) {
            pthread_mutex_lock(&lock);
            long long telling = shed + skipped;
            pthread_mutex_unlock(&lock);
            pack_header(&header, slot, payload, bytes);
            told = telling;
        }
        if (alive && pending) {
            int outcome = send_chunk(&header, payload, bytes);
            alive = outcome >= 0;
            if (outcome == 1) {
                pthread_mutex_lock(&lock);
                if (slot) sent += slot->rows, free_slots[n_free++] = slot;
                pthread_mutex_unlock(&lock);
                slot = NULL, pending = 0, header.n = 0, busy = 1, seq++;
            }
        }
        if (!alive) redis_close(&redis);
        if (!busy) sleep_ms(5);
    }
    if (redis.fd >= 0) {
        report();
        redis_call(&redis, 2, ARGS("DEL", key("info")));
    }
    free(header.data);
    redis_close(&redis);
    return NULL;
}

static void on_signal(int number) { (void)number, stopping = 1; }

int main(int argc, char **argv) {
    if (argc != 10) {
        fprintf(stderr, "usage: %s unix:PATH|HOST:PORT ENGINE TARGET_DIGEST LAYERS HIDDEN VOCAB LOW MIDDLE HIGH\n", argv[0]);
        return 2;
    }
    engine = argv[2], target = argv[3];
    layers = atoi(argv[4]), hidden = atoi(argv[5]), vocab = atoi(argv[6]);
    for (int i = 0; i < STATES; i++) aux[i] = atoi(argv[7 + i]);
    if (hidden < 1 || strlen(target) != 64 || strlen(engine) > 64) return fprintf(stderr, "an argument is wrong\n"), 2;
    snprintf(incarnation, sizeof incarnation, "run-%lld-%d", (long long)time(NULL), (int)getpid());
    for (int i = 0; i < SLOTS; i++) {
        slots[i].states = calloc((size_t)ROWS * STATES * (size_t)hidden, 2);
        if (!slots[i].states) return fprintf(stderr, "out of memory\n"), 1;
        free_slots[n_free++] = &slots[i];
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    pthread_t link;
    if (pthread_create(&link, NULL, link_loop, argv[1])) return fprintf(stderr, "no thread\n"), 1;
    serve();
    pthread_join(link, NULL);
    printf("{\"incarnation\": \"%s\", \"tapped\": %lld, \"sent\": %lld, \"shed\": %lld, \"skipped\": %lld}\n", incarnation, tapped, sent, shed, skipped);
    for (int i = 0; i < SLOTS; i++) free(slots[i].states);
    return 0;
}
